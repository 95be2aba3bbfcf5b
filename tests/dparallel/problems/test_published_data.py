"""The data that a protocol names: on the Hub, or in a local copy of any layout."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets.arrow_writer import ArrowWriter

from dparallel.config.base import ConfigError
from dparallel.config.problems import ProblemsConfig
from dparallel.config.protocol import ProtocolConfig
from dparallel.problems.registry import data_of, problems_digest
from dparallel.problems.sources import ProblemsError, dataset_problems
from dparallel.stages.manifest import stage_key

ROWS = [
    {"task": f"How many is {n} + 1?", "tests": [f"f({n})", f"g({n})"], "answer": str(n + 1)} for n in range(6)
]
HUB = {"path": "someone/sums", "subset": "main", "split": "test", "reference": "answer"}
PROTOCOL = {"prompt": "{task} {tests[1]}", "extra": ["tests"], "data": [HUB]}


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())
    return path


def config(protocol: dict[str, Any] = PROTOCOL, **settings: Any) -> ProblemsConfig:
    return ProblemsConfig.model_validate({"benchmark": "dataset", "protocol": protocol, **settings})


def references(**settings: Any) -> list[str | None]:
    return [problem.reference for problem in dataset_problems(config(**settings))]


def test_a_copy_of_any_layout_gives_the_same_problems(tmp_path: Path) -> None:
    """Ids and source are those of the published data set, so that results of copies can be compared."""
    named = {**PROTOCOL, "file": {"names": ["sums_test.jsonl.gz", "sums_test.jsonl"]}}
    places = [
        write(tmp_path / "any.jsonl"),
        write(tmp_path / "any.jsonl.gz"),
        write(tmp_path / "split" / "test.jsonl").parent,
        write(tmp_path / "hub" / "main" / "test-00000-of-00001.jsonl").parents[1],
        write(tmp_path / "many" / "sums_test.jsonl.gz").parent,
    ]
    write(tmp_path / "many" / "other_test.jsonl", [{"other": 1}])
    whole = dataset_problems(config(named, path=str(places[0])))
    assert [problem.problem_id for problem in whole] == [f"sums-{row:05d}" for row in range(1, 7)]
    assert {problem.source for problem in whole} == {"someone/sums main test"}
    assert whole[1].prompt == "How many is 1 + 1? g(1)"
    assert whole[1].extra == {"tests": ["f(1)", "g(1)"]}
    for place in places[1:]:
        settings = config(named, path=str(place))
        assert dataset_problems(settings) == whole, place
        assert settings.files(), place


def test_a_file_may_hold_more_rows_and_other_columns_than_the_data_set(tmp_path: Path) -> None:
    rows = [{**row, "text": row["task"]} for row in ROWS]
    for row in rows:
        del row["task"]
    path = write(tmp_path / "sums.jsonl", rows)
    protocol = {**PROTOCOL, "file": {"rows": "[2:5]", "columns": {"task": "text", "answer": "answer"}}}
    problems = dataset_problems(config(protocol, path=str(path)))
    assert [problem.reference for problem in problems] == ["3", "4", "5"]
    assert problems[0].prompt == "How many is 2 + 1? g(2)"
    assert references(protocol=protocol, path=str(path), rows="[1:]") == ["4", "5"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rows": "[:2]"}, "12"),
        ({"rows": "[2:]"}, "3456"),
        ({"rows": "[-2:]"}, "56"),
        ({"rows": "[50%:]"}, "456"),
        ({"count": 2}, "12"),
        ({"count": 2, "rows": "[3:]"}, "45"),
    ],
)
def test_problems_are_selected_from_the_data(settings: dict[str, Any], expected: str, tmp_path: Path) -> None:
    path = write(tmp_path / "sums.jsonl")
    assert "".join(map(str, references(path=str(path), **settings))) == expected


def test_a_seed_draws_from_the_selected_rows(tmp_path: Path) -> None:
    path = str(write(tmp_path / "sums.jsonl"))
    drawn = references(path=path, count=3, seed=1, rows="[1:]")
    assert drawn == references(path=path, count=3, seed=1, rows="[1:]")
    assert set(drawn) < set("23456")
    assert drawn != references(path=path, count=3, seed=3, rows="[1:]")


def test_parts_of_a_data_set_are_read_in_order_from_its_folder_or_one_file(tmp_path: Path) -> None:
    parts = [{**HUB, "subset": subset} for subset in ("algebra", "geometry")]
    protocol = {**PROTOCOL, "data": parts}
    write(tmp_path / "folder" / "algebra" / "test.jsonl", ROWS[:2])
    write(tmp_path / "folder" / "geometry" / "test.jsonl", ROWS[2:])
    problems = dataset_problems(config(protocol, path=str(tmp_path / "folder")))
    assert [problem.reference for problem in problems] == list("123456")
    assert problems[0].problem_id == "sums-algebra-00001"
    assert problems[2].problem_id == "sums-geometry-00001"
    assert problems[2].source == "someone/sums geometry test"
    merged = dataset_problems(config(protocol, path=str(write(tmp_path / "sums.jsonl")), rows="[1:4]"))
    assert [problem.problem_id for problem in merged] == [f"sums-{row:05d}" for row in (2, 3, 4)]
    assert {problem.source for problem in merged} == {"someone/sums test"}


def test_without_a_path_the_hub_is_asked() -> None:
    """Where there is no network, the message says what to fetch and where to give it."""
    remedy = r"offline, get a copy of {} and give path: COPY \(dparallel eval: --path COPY\)"
    start = "someone/sums main test: cannot be read: .*"
    with pytest.raises(ProblemsError, match=start + remedy.format("the data set someone/sums")):
        dataset_problems(config())
    named = {**PROTOCOL, "file": {"url": "https://example.org/sums.jsonl"}}
    with pytest.raises(ProblemsError, match=start + remedy.format("https://example.org/sums.jsonl")):
        dataset_problems(config(named))
    with pytest.raises(ProblemsError, match=start + "offline, give the path of a local copy"):
        dataset_problems(config({}, sources=[HUB]))


def test_a_copy_that_is_not_whole_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "sums.jsonl")
    for problems, told in ((6, 0), (7, 1), (7, 0)):
        caplog.clear()
        dataset_problems(config({**PROTOCOL, "problems": problems}, path=str(path), rows="[:2]"))
        lines = [record.getMessage() for record in caplog.records if "holds" in record.getMessage()]
        expected = f"{path} holds 6 problems, and the published data set 7: numbers do not compare with"
        assert [line.startswith(expected) for line in lines] == [True] * told


def test_results_say_which_commit_of_the_hub_they_are_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From the cache of the library `datasets`, as a download leaves it."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    commit = "0123456789" * 4
    folder = tmp_path / "cache" / "someone___sums" / "main" / "0.0.0" / commit
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(ROWS)
    with ArrowWriter(path=str(folder / "sums-test.arrow")) as writer:
        writer.write_table(table)
        writer.finalize()
    info = {"builder_name": "json", "dataset_name": "sums", "config_name": "main", "version": "0.0.0"}
    split = {"name": "test", "num_examples": len(ROWS), "dataset_name": "sums"}
    content = json.dumps({**info, "splits": {"test": split}})
    (folder / "dataset_info.json").write_text(content, encoding="utf-8")
    assert references() == list("123456")
    assert data_of(config()) == [f"someone/sums main test @{commit}"]
    assert "asked for" not in caplog.text
    other = {**PROTOCOL, "data": [{**HUB, "revision": "f" * 40}]}
    assert references(protocol=other, rows="[:2]") == ["1", "2"]
    assert f"revision {'f' * 40} is asked for, the cache holds {commit}" in caplog.text
    path = write(tmp_path / "sums.jsonl")
    assert data_of(config(path=str(path))) == [str(path)]


def test_own_sources_replace_the_data_of_the_protocol(tmp_path: Path) -> None:
    path = write(tmp_path / "other.jsonl", ROWS[:2])
    [problem] = dataset_problems(config(sources=[{"path": str(path), "reference": "answer"}], rows="[1:]"))
    assert (problem.problem_id, problem.source) == ("other-00002", "other.jsonl")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protocol": {}}, r"needs sources .* or a protocol with data"),
        ({"seed": 1}, "seed=1: it draws count problems"),
        ({"rows": "200"}, "rows: String should match"),
        ({"split": "test"}, r"split='test': splits belong to its sources"),
        ({"sources": [HUB], "path": "a"}, r"path='a' and sources: path replaces the data of the protocol"),
        ({"protocol": {"file": {"rows": "[1:]"}}}, r"protocol: file says how .* give data"),
        ({"protocol": {**PROTOCOL, "file": {"rows": "3"}}}, r"protocol\.file\.rows: String should match"),
        ({"protocol": {**PROTOCOL, "licence": ""}}, r"protocol\.licence"),
        ({"protocol": {**PROTOCOL, "decoding": {"rule": "steps"}}}, "protocol.decoding: rule='steps' with"),
        ({"protocol": {**PROTOCOL, "decoding": {"lenght": 3}}}, r"protocol\.decoding\.lenght: unknown key"),
        ({"protocol": {**PROTOCOL, "date": []}}, r"protocol\.date: unknown key; did you mean 'data'\?"),
        ({"protocol": {**PROTOCOL, "stops": [""]}}, "stops holds an empty text"),
        ({"benchmark": "coins", "count": 1, "path": "a", "protocol": {}}, "path='a'.*it is generated"),
        (
            {"benchmark": "coins", "count": 1, "protocol": {"data": [HUB]}},
            r"drop protocol.prompt, protocol.d",
        ),
    ],
)
def test_settings_that_make_no_sense_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ProblemsConfig(**{"benchmark": "dataset", "protocol": PROTOCOL, **settings})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere.jsonl", None, r"path=.*nowhere\.jsonl: no such file or folder"),
        ("nowhere", None, "path=.*nowhere: no such file or folder"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: damaged or no gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"task": "a"}\n' * 9, mtime=0)[:-12], "damaged or no gzip file"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"task": "a", "tests": []}\n', mtime=0),
            r"no column 'answer'; its columns: ta",
        ),
        ("a.jsonl", b'{"task": "a", "answer": "1"}\n', r"no column 'tests.*'; its columns: task, answer"),
        (
            "a.jsonl",
            b'{"task": "a", "answer": "1", "tests": ["x"]}\n',
            r"a\.jsonl, row 1: column 'tests' holds 1 items, .* item \[1\] of a list",
        ),
        (
            "a.jsonl",
            b'{"task": "a", "answer": "1", "tests": "x"}\n',
            r"a\.jsonl, row 1: column 'tests' holds 'x', .* item \[1\] of a list",
        ),
        ("a.tar.gz", b"", r"files of one kind, named .*\.jsonl\.gz"),
    ],
)
def test_a_copy_that_cannot_be_used_is_named(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ProblemsError, match=message):
        dataset_problems(config(path=str(tmp_path / name)))


def test_more_problems_than_there_are_are_refused(tmp_path: Path) -> None:
    path = str(write(tmp_path / "sums.jsonl"))
    with pytest.raises(ProblemsError, match=r"sums\.jsonl \[4:\] holds 2 problems, wanted 3: lower count"):
        dataset_problems(config(path=path, rows="[4:]", count=3))
    with pytest.raises(ProblemsError, match=r"sums\.jsonl \[6:\] holds 0 problems"):
        dataset_problems(config(path=path, rows="[6:]"))


def test_licence_and_published_decoding_are_in_no_key_but_what_is_asked_is(tmp_path: Path) -> None:
    path = str(write(tmp_path / "sums.jsonl"))

    def key(protocol: dict[str, Any] | None = None, **settings: Any) -> str:
        return stage_key(config({**PROTOCOL, **(protocol or {})}, path=path, **settings), {}, None)

    assert key({"licence": "MIT", "decoding": {"threshold": 0.3}}) == key()
    others = [key({"version": 2}), key(count=2), key(rows="[1:]"), key({"stops": ["x"]})]
    assert len({key(), *others}) == 5


def test_changed_rows_are_other_problems(tmp_path: Path) -> None:
    path = write(tmp_path / "sums.jsonl")
    before = problems_digest(dataset_problems(config(path=str(path))))
    write(path, [*ROWS[:-1], {**ROWS[-1], "task": "How many is 7 + 1?"}])
    assert problems_digest(dataset_problems(config(path=str(path)))) != before


def test_protocols_are_complete_as_python_too() -> None:
    protocol = ProtocolConfig(**PROTOCOL, licence="MIT", decoding={"gen_length": 128, "threshold": 0.4})
    assert protocol.decoding is not None
    assert (protocol.decoding.block_length, protocol.decoding.rule) == (32, "entropy")
    assert protocol.data[0].label == "someone/sums main test"
