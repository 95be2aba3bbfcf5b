import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dparallel.problems.tables import Concatenation, TableError, open_table

ROWS = [{"a": f"text {n}", "b": n} for n in range(7)]
COLUMNS = {name: [row[name] for row in ROWS] for name in "ab"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lines.jsonl", "\n".join(json.dumps(row) for row in ROWS)),
        ("blank_lines.jsonl", "\r\n\n" + "\r\n \r\n".join(json.dumps(row) for row in ROWS) + "\n\n"),
        ("marked.jsonl", "\ufeff" + "\n".join(json.dumps(row) for row in ROWS)),
        ("lines.json", "\n".join(json.dumps(row) for row in ROWS)),
        ("list.json", json.dumps(ROWS)),
        ("list.jsonl", " " + json.dumps(ROWS, indent=1)),
        ("marked_list.json", "\ufeff" + json.dumps(ROWS)),
        ("columns.json", json.dumps(COLUMNS, indent=1)),
        ("columns_in_a_line.json", json.dumps(COLUMNS)),
        ("columns_in_a_line.jsonl", "\ufeff" + json.dumps(COLUMNS) + "\n\n"),
        ("named_list.json", json.dumps({"data": ROWS})),
        ("long_named_list.json", json.dumps({"data": ROWS}, indent=1)),
    ],
)
def test_every_way_to_write_rows_as_json_gives_the_same_rows(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(content.encode("utf-8"))
    table = open_table(tmp_path / name)
    assert len(table) == 7
    assert table.read(range(7), ["a", "b"]) == (ROWS, ["a", "b"])
    assert table.read([1, 5], ["b", "c"]) == ([{"b": 1, "c": None}, {"b": 5, "c": None}], ["a", "b"])


def test_parquet_rows_are_read_across_row_groups_and_files(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS[:5]), tmp_path / "one.parquet", row_group_size=2)
    extra = [row | {"c": 1.5} for row in ROWS[5:]]
    pq.write_table(pa.Table.from_pylist(extra), tmp_path / "other.parquet")
    both = Concatenation([open_table(tmp_path / "one.parquet"), open_table(tmp_path / "other.parquet")])
    for rows in ([0], [1, 2, 6], [4, 5], list(range(7))):
        records, columns = both.read(rows, ["a", "b"])
        assert records == [ROWS[row] for row in rows]
        assert columns == (["a", "b", "c"] if rows[-1] > 4 else ["a", "b"])
    assert both.read([4, 5], ["c"])[0] == [{"c": None}, {"c": 1.5}]


def test_a_column_that_nobody_asked_for_may_differ_between_files(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": ["x"], "b": [1]}), tmp_path / "one.parquet")
    pq.write_table(pa.table({"a": ["y"], "b": ["one"], "c": [[1]]}), tmp_path / "other.parquet")
    both = Concatenation([open_table(tmp_path / "one.parquet"), open_table(tmp_path / "other.parquet")])
    assert both.read([0, 1], ["a"]) == ([{"a": "x"}, {"a": "y"}], ["a", "b", "c"])


def read_all(file: Path) -> None:
    table = open_table(file)
    table.read(range(len(table)), ["a"])


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "latin.jsonl",
            '{"a": "x"}\n\n{"a": "Köln"}\n'.encode("latin-1"),
            r"latin\.jsonl, row 2: byte 0xf6 at position 8 is not UTF-8: .*iconv -f ISO-8859-1 -t UTF-8",
        ),
        ("latin.json", '[{"a": "x"},\n{"a": "Köln"}]'.encode("latin-1"), r"latin\.json, line 2: byte 0xf6"),
        ("digits.jsonl", b'{"a": ' + b"9" * 5000 + b"}", r"row 1: cannot be read \(Exceeds the limit"),
        ("deep.jsonl", b'{"a": ' + DEEP.encode() + b"}", r"row 1: cannot be read \(maximum recursion"),
        ("cut.jsonl", b'{"a": "x"}\n{"a": ', r"row 2: not JSON \(Expecting value"),
        ("list.jsonl", b'{"a": "x"}\n["x"]', "row 2: holds a value of type list, expected an object"),
        ("texts.json", b'["x", "y"]', "row 1: holds a value of type str, expected an object"),
        (
            "object.json",
            b'{\n"a": "x",\n"b": {}\n}',
            r"holds one dict of a, b \(dict of 0\), and neither rows nor columns of equal length: ",
        ),
        ("uneven.json", b'{\n"a": ["x"],\n"b": []\n}', r"one dict of a \(list of 1\), b \(list of 0\), and"),
        ("uneven_line.json", b'{"a": ["x"], "b": []}', "write one object a line, or a list of objects"),
        ("pandas.json", b'{"a": {"0": "x"}, "b": {"0": "y"}}', r"one dict of a \(dict of 1\), b \(dict of"),
        (
            "named.json",
            b'{\n"version": 2,\n"data": [{}]\n}',
            r"dict of version, data \(list of 1\), and neither",
        ),
        ("cut.parquet", b"PAR1", r"cut\.parquet: no Parquet file that can be read"),
    ],
)
def test_what_cannot_be_read_is_named_by_file_row_and_remedy(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TableError, match=message):
        read_all(tmp_path / name)


def test_a_single_row_stays_a_row(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"a": "x", "options": ["x", "y"]}\n', encoding="utf-8")
    assert open_table(tmp_path / "p.jsonl").read([0], ["a", "options"])[0] == [
        {"a": "x", "options": ["x", "y"]}
    ]


def test_only_the_rows_asked_for_are_parsed(tmp_path: Path) -> None:
    """Reading a few rows of a large file is fast."""
    (tmp_path / "p.jsonl").write_text('{"a": "x"}\nno JSON\n{"a": "z"}\n', encoding="utf-8")
    table = open_table(tmp_path / "p.jsonl")
    assert len(table) == 3
    assert table.read([0, 2], ["a"]) == ([{"a": "x"}, {"a": "z"}], ["a"])


def test_two_columns_of_one_name_are_refused_where_one_is_asked_for(tmp_path: Path) -> None:
    columns = [pa.array(["x"]), pa.array(["y"]), pa.array(["z"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["a", "a", "b"]), tmp_path / "twice.parquet")
    table = open_table(tmp_path / "twice.parquet")
    assert table.read([0], ["b"])[0] == [{"b": "z"}]
    with pytest.raises(TableError, match=r"twice\.parquet: two columns are called 'a': rename one"):
        table.read([0], ["a"])
