"""Data sets in JSONL, JSON and Parquet files and folders; a Hub id is replaced by a folder's path."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from dparallel.config.base import ConfigError
from dparallel.config.problems import ProblemsConfig, ProtocolConfig, SourceConfig
from dparallel.problems import splits
from dparallel.problems.sources import Problem, ProblemsError, dataset_problems

ROWS = [{"question": f"How many is {n} + 1?", "answer": str(n + 1), "level": n} for n in range(6)]


def write(path: Path, rows: list[dict] = ROWS) -> Path:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config(*sources: dict[str, Any], **settings: Any) -> ProblemsConfig:
    return ProblemsConfig.model_validate({"benchmark": "dataset", "sources": sources, **settings})


def read(path: Path | str, **settings: Any) -> list[Problem]:
    columns = {"prompt": "{question}", "reference": "answer"}
    return dataset_problems(config({"path": str(path), **columns, **settings}))


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.parquet"])
def test_every_kind_of_file_gives_the_same_problems(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    problems = read(path)
    assert problems[1] == Problem("p-00002", name, "How many is 1 + 1?", reference="2")
    assert [problem.reference for problem in problems] == ["1", "2", "3", "4", "5", "6"]


def test_a_folder_has_splits_and_slices_as_a_hub_data_set_has(tmp_path: Path) -> None:
    write(tmp_path / "gsm" / "train-00000-of-00001.parquet")
    write(tmp_path / "gsm" / "test-00000-of-00001.parquet", ROWS[4:])
    assert len(read(tmp_path / "gsm")) == 6
    assert [problem.reference for problem in read(tmp_path / "gsm", split="test")] == ["5", "6"]
    assert [problem.reference for problem in read(tmp_path / "gsm", split="train[:2]")] == ["1", "2"]
    assert [problem.reference for problem in read(tmp_path / "gsm", split="train[5:]")] == ["6"]
    with pytest.raises(ProblemsError, match=r"gsm dev: Unknown split \"dev\""):
        read(tmp_path / "gsm", split="dev")


def test_files_by_pattern_are_one_data_set_whose_split_may_be_sliced(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ROWS[:3])
    write(tmp_path / "b.parquet", ROWS[3:])
    sliced = read(tmp_path / "*.parquet", split="test[2:4]")
    assert [problem.reference for problem in sliced] == ["3", "4"]


def test_the_prompt_is_made_of_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl")
    prompt = "Question: {question} (level {level})\nAnswer: within \\boxed{{}}."
    first, *_ = read(path, prompt=prompt, id="question", reference=None)
    assert first.prompt == "Question: How many is 0 + 1? (level 0)\nAnswer: within \\boxed{}."
    assert first.problem_id == "How many is 0 + 1?"
    assert first.reference is None


def test_columns_of_our_own_names_need_no_map(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "reference": "b", "id": 7}, {"prompt": "c", "reference": None, "id": 8}]
    path = write(tmp_path / "p.jsonl", rows)
    known, unknown = dataset_problems(config({"path": str(path)}))
    assert known == Problem("7", "p.jsonl", "a", reference="b")
    assert unknown.reference is None


def test_count_takes_the_first_and_seed_draws(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl")
    assert [problem.reference for problem in read(path, count=2)] == ["1", "2"]
    drawn = read(path, count=4, seed=1)
    assert drawn == read(path, count=4, seed=1)
    assert drawn != read(path, count=4, seed=3)
    assert len({problem.problem_id for problem in drawn}) == 4
    assert drawn[-1] in read(path), "a drawn row keeps its number"


def test_sources_are_mixed_in_their_order(tmp_path: Path) -> None:
    math = write(tmp_path / "math.parquet", [{"problem": "x + y?", "solution": "z"}])
    mixed = config(
        {"path": str(write(tmp_path / "p.jsonl")), "prompt": "{question}", "count": 2},
        {"path": str(math), "prompt": "{problem}", "reference": "solution"},
    )
    assert [problem.prompt for problem in dataset_problems(mixed)] == [
        "How many is 0 + 1?",
        "How many is 1 + 1?",
        "x + y?",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "{qustion}"}, "no column 'qustion'; its columns: question, answer, level"),
        ({"reference": "anwser"}, "no column 'anwser'; its columns: question, answer, level"),
        (
            {"reference": None, "columns": {"reference": "anwser"}},
            "no column 'anwser'; its columns: question, answer, level",
        ),
        (
            {"id": None, "columns": {"id": "nubmer"}},
            "no column 'nubmer'; its columns: question, answer, level",
        ),
        ({"id": "key"}, "no column 'key'"),
        ({"count": 7}, "holds 6 problems, wanted 7: lower count"),
        ({"split": "train[6:]"}, "train.6:. holds 0 problems: give another .* slice"),
    ],
)
def test_what_a_data_set_lacks_is_named(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ProblemsError, match=rf"p\.jsonl.*{message}"):
        read(write(tmp_path / "p.jsonl"), **settings)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROWS[0], {"question": " ", "answer": "1"}], "row 2: column 'question' of the prompt is empty"),
        ([ROWS[0], {"answer": "1"}], "row 2: column 'question' of the prompt is empty"),
        ([{"question": ["a"], "answer": "1"}], r"row 1: column 'question' holds \['a'\], expected a text"),
        ([{"question": "a", "answer": True}], "row 1: column 'answer' holds True, expected .* as a text"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, rows: list[dict], message: str) -> None:
    with pytest.raises(ProblemsError, match=rf"p\.jsonl, {message}"):
        read(write(tmp_path / "p.jsonl", rows))


def test_numbers_are_texts_as_they_are_written(tmp_path: Path) -> None:
    rows = [{"question": 0.1, "answer": 3}, {"question": 1.5, "answer": None}]
    problems = read(write(tmp_path / "p.parquet", rows))
    assert [(each.prompt, each.reference) for each in problems] == [("0.1", "3"), ("1.5", None)]
    table = pa.table({"question": ["a", "b"], "answer": [3.0, float("nan")]})
    pq.write_table(table, tmp_path / "gaps.parquet")
    assert read(tmp_path / "gaps.parquet", count=1)[0].reference == "3"
    with pytest.raises(ProblemsError, match="row 2: column 'answer' holds nan, expected a text or a number"):
        read(tmp_path / "gaps.parquet")


@pytest.mark.parametrize("prompt", ["{question!x}", "{question:>d}", "{question:q}"])
def test_a_prompt_that_cannot_be_filled_in_is_refused_before_any_data_is_read(prompt: str) -> None:
    for setting in ("prompt", "prefill"):
        with pytest.raises(ValidationError, match=rf"{setting}='.*': .*columns come as texts"):
            ProtocolConfig.model_validate({setting: prompt})
    with pytest.raises(ConfigError, match="prompt='.*': .*columns come as texts"):
        SourceConfig(path="a", prompt=prompt)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b"", "holds 0 problems"),
        ("p.jsonl", b'{"question": "a"}\n{"question": \n', r"row 2: not JSON \(Expecting value at column 13"),
        ("p.jsonl", b"\xff\xfe\x00\x01", "row 1: byte 0xff at position 0 is not UTF-8"),
        ("p.parquet", b"PAR1", "Parquet"),
        ("weights.bin", b"\x00", "files of one kind, named .jsonl, .json, .parquet"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ProblemsError, match=rf"{name}.*{message}"):
        read(tmp_path / name)


def test_a_missing_file_is_named_and_not_looked_for_on_the_hub() -> None:
    for path in ("nowhere.jsonl", "/nowhere/data", "a/b/c"):
        with pytest.raises(ProblemsError, match=f"{path}: no such problems file"):
            read(path)


def test_a_name_that_is_no_path_is_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ProblemsError, match=r"nobody/nothing main test\[:5\]: cannot be read.*local copy"):
        read("nobody/nothing", subset="main", split="test[:5]")


def test_settings_of_the_hub_are_refused_for_local_data(tmp_path: Path) -> None:
    file = write(tmp_path / "data" / "train.jsonl")
    for path in (file, file.parent, file.parent / "*.jsonl"):
        with pytest.raises(
            ProblemsError, match=r"revision='v1' is for data sets on the Hub, .*revision=null"
        ):
            read(path, revision="v1")
    for path in (file, file.parent / "*.jsonl"):
        with pytest.raises(
            ProblemsError, match=r"subset='main' is for folders and data sets on .*subset=null"
        ):
            read(path, subset="main")


def test_every_local_file_is_known(tmp_path: Path) -> None:
    one, other = write(tmp_path / "p.jsonl"), write(tmp_path / "folder" / "train.parquet")
    template = tmp_path / "chat.jinja"
    sources = [{"path": str(one)}, {"path": str(tmp_path / "folder")}, {"path": "openai/gsm8k"}]
    files = config(*sources, protocol={"chat": True, "chat_template": str(template)}).files()
    assert files == [one, other, template]


def test_rows_are_numbered_in_the_whole_split_whatever_its_slice(tmp_path: Path) -> None:
    """A row has the same id in every slice, so that recorded rows can be identified."""
    write(tmp_path / "p.jsonl")
    write(tmp_path / "gsm" / "test-00000-of-00002.parquet", ROWS[:2])
    write(tmp_path / "gsm" / "test-00001-of-00002.parquet", ROWS[2:])
    for path, name in ((tmp_path / "p.jsonl", "p"), (tmp_path / "gsm", "gsm")):
        slices = {
            "test[:2]": [1, 2],
            "test[2:]": [3, 4, 5, 6],
            "test[-2:]": [5, 6],
            "test[50%:]": [4, 5, 6],
            "test[4:]+test[:1]": [5, 6, 1],
        }
        for split, rows in slices.items():
            problems = read(path, split=split)
            assert [each.problem_id for each in problems] == [f"{name}-{row:05d}" for row in rows]
            assert [each.reference for each in problems] == [str(row) for row in rows]
        drawn = read(path, split="test[2:]", count=2, seed=0)
        assert {each.problem_id for each in drawn} < {f"{name}-{row:05d}" for row in range(3, 7)}
    with pytest.raises(ProblemsError, match=r"p\.jsonl test\[4:2\] holds 0 problems"):
        read(tmp_path / "p.jsonl", split="test[4:2]")
    with pytest.raises(ProblemsError, match=r"row 3: column 'question' .* is empty"):
        read(write(tmp_path / "e.jsonl", [*ROWS[:2], {"question": ""}]), split="test[1:]")


def test_rows_of_a_hub_data_set_are_numbered_in_the_whole_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library `datasets` loads the folder here, as it loads a Hub data set."""
    write(tmp_path / "gsm" / "test.parquet")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    source = SourceConfig(
        path=str(tmp_path / "gsm"), split="test[4:]", prompt="{question}", reference="answer"
    )
    [(table, rows)] = splits.sliced(source.split, splits.of_hub(source))
    assert list(rows) == [4, 5]
    records, columns = table.read(rows, ["answer", "nothing"])
    assert records == [{"answer": "5", "nothing": None}, {"answer": "6", "nothing": None}]
    assert columns == ["question", "answer", "level"]


def test_columns_that_only_a_scorer_reads_and_the_beginning_of_the_response_travel_along(
    tmp_path: Path,
) -> None:
    rows = [
        {"prompt": "def f():", "tests": ["f() == 1"], "entry": {"point": "f", "arguments": 0}, "level": 3}
    ]
    protocol = {"prefill": "```python\n{prompt}", "extra": ["tests", "entry", "level"]}
    for name in ("p.jsonl", "p.parquet"):
        path = write(tmp_path / name, rows)
        [problem] = dataset_problems(config({"path": str(path)}, protocol=protocol))
        assert problem.prefill == "```python\ndef f():"
        assert problem.extra == {"tests": ["f() == 1"], "entry": {"point": "f", "arguments": 0}, "level": 3}
        with pytest.raises(ProblemsError, match="no column 'test'"):
            dataset_problems(config({"path": str(path)}, protocol={"extra": ["test"]}))


def test_a_column_is_named_by_the_whole_text_between_the_braces(tmp_path: Path) -> None:
    rows = [{"q.text": "1 + 1?", "a[0]": "2", "q": {"text": "another"}}]
    for name in ("p.jsonl", "p.parquet"):
        path = write(tmp_path / name, rows)
        [problem] = read(path, prompt="{q.text} {a[0]}", reference="a[0]")
        assert (problem.prompt, problem.reference) == ("1 + 1? 2", "2")
        with pytest.raises(ProblemsError, match=r"no column 'q\.length'; its columns: q\.text, a\[0\], q"):
            read(path, prompt="{q.length}")


@pytest.mark.parametrize("name", ["p[1].jsonl", "p*.jsonl", "q?.parquet", "r[1]/p.jsonl", "s[1]"])
def test_a_name_that_looks_like_a_pattern_is_a_name_where_it_exists(tmp_path: Path, name: str) -> None:
    write(tmp_path / "p1.jsonl", ROWS[:1])
    path = tmp_path / name
    write(path if path.suffix else path / "train.jsonl", ROWS[1:])
    assert len(read(path)) == 5
    assert config({"path": str(path)}).files() == [path if path.suffix else path / "train.jsonl"]


def test_texts_that_look_like_dates_stay_texts(tmp_path: Path) -> None:
    rows = [
        {"question": "2024-01-01", "answer": "2024-01-01T10:00:00Z", "id": "2024-02-03"},
        {"question": "2024-01-02", "answer": "2024-01-02 10:00:00", "id": "2024-02-04"},
    ]
    for name in ("p.jsonl", "p.json"):
        problems = read(write(tmp_path / name, rows))
        assert [(each.prompt, each.reference, each.problem_id) for each in problems] == [
            (row["question"], row["answer"], row["id"]) for row in rows
        ]
    dates = pa.table({"question": ["a"], "answer": pa.array(["2024-01-01"]).cast(pa.date32())})
    pq.write_table(dates, tmp_path / "dates.parquet")
    with pytest.raises(ProblemsError, match=r"dates\.parquet: column 'answer' holds dates .* as a text into"):
        read(tmp_path / "dates.parquet")
    assert read(tmp_path / "dates.parquet", reference=None)[0].prompt == "a"


def test_half_a_character_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"question": "\\ud83d", "answer": "1"}\n', encoding="utf-8")
    with pytest.raises(ProblemsError, match=r"p\.jsonl, row 1: column 'question' holds half a character"):
        read(tmp_path / "p.jsonl")
