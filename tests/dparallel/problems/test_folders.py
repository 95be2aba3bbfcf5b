"""Folders of problems: which files are read, and messages about the others."""

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dparallel.config.problems import ProblemsConfig
from dparallel.problems.sources import ProblemsError, dataset_problems


def make(folder: Path, *names: str) -> Path:
    """Files with one problem each, whose prompt is the file's name."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".parquet":
            pq.write_table(pa.table({"prompt": [name]}), file)
        elif file.suffix in (".jsonl", ".json"):
            file.write_text(json.dumps({"prompt": name}) + "\n", encoding="utf-8")
        else:
            file.write_text(f"prompt\n{name}\n", encoding="utf-8")
    return folder


def read(path: Path, **source: str) -> list[str]:
    config = {"benchmark": "dataset", "sources": [{"path": str(path), **source}]}
    return [problem.prompt for problem in dataset_problems(ProblemsConfig.model_validate(config))]


@pytest.mark.parametrize(
    "names",
    [
        ("a.parquet", "b.jsonl", "c.jsonl"),
        ("a.jsonl", "b.parquet", "c.parquet"),
        ("train.parquet", "test.jsonl"),
        ("train.jsonl", "more.parquet"),
        ("sub/a.parquet", "b.jsonl"),
    ],
)
def test_files_of_several_kinds_are_refused_with_the_list(tmp_path: Path, names: tuple[str, ...]) -> None:
    message = r"give files of one kind, named \.jsonl, \.json, \.parquet.*; found "
    with pytest.raises(ProblemsError, match=message) as folder:
        read(make(tmp_path, *names))
    assert all(Path(name).name in str(folder.value) for name in names)
    if "/" not in "".join(names):
        with pytest.raises(ProblemsError, match=message):
            read(tmp_path / "*")


def test_tables_of_other_kinds_are_named_as_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, "a.jsonl", "r1.csv", "r2.csv", "LICENSE", ".hidden.jsonl", ".cache/b.parquet")
    with caplog.at_level(logging.INFO, "dparallel"):
        assert read(tmp_path) == ["a.jsonl"]
    assert "the splits of this folder are train (a.jsonl)" in caplog.text
    assert "files in no split, which are not read: LICENSE, r1.csv, r2.csv" in caplog.text
    with pytest.raises(ProblemsError, match=r"found other: LICENSE, r1\.csv, r2\.csv; JSON: a\.jsonl"):
        read(tmp_path / "*")
    with pytest.raises(ProblemsError, match=r"no \.jsonl, .* file of a split .*; it holds r\.csv"):
        read(make(tmp_path / "tables", "r.csv"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ProblemsError, match="it holds no file"):
        read(tmp_path / "empty")


def test_a_problems_file_whose_name_says_no_split_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert read(make(tmp_path, "train.jsonl", "more.jsonl")) == ["train.jsonl"]
    [warning] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage().endswith("files in no split, which are not read: more.jsonl")


@pytest.mark.parametrize("name", ["B.JSONL", "b.jsonl.zst", "b.csv", "b.TSV"])
def test_rows_of_a_kind_that_is_not_read_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    assert read(make(tmp_path, "a.jsonl", name)) == ["a.jsonl"]
    [warning] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage().endswith(f"files in no split, which are not read: {name}")


def test_names_say_the_split_and_sub_folders_are_included(tmp_path: Path) -> None:
    make(tmp_path / "plain", "b.jsonl", "sub/a.jsonl")
    assert sorted(read(tmp_path / "plain")) == ["b.jsonl", "sub/a.jsonl"]
    make(tmp_path / "named", "data/test-00000-of-00001.parquet", "data/train-00000-of-00001.parquet")
    assert read(tmp_path / "named", split="test") == ["data/test-00000-of-00001.parquet"]
    make(tmp_path / "folders", "test/a.jsonl", "train/b.jsonl", "dataset_info.json")
    assert read(tmp_path / "folders", split="test") == ["test/a.jsonl"]
    make(tmp_path / "subsets", "main/train.jsonl", "socratic/train.jsonl")
    assert read(tmp_path / "subsets", subset="main") == ["main/train.jsonl"]
    with pytest.raises(ProblemsError, match="no subset 'other': it is neither in a README.md nor"):
        read(tmp_path / "subsets", subset="other")


CARD = """---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files: socratic/*.parquet
- config_name: folder
  data_dir: main
---
# A data set
"""


def test_a_dataset_card_says_what_the_files_are(tmp_path: Path) -> None:
    names = ("main/train-0.jsonl", "main/test-0.jsonl", "socratic/x.parquet", "socratic/notes.jsonl")
    make(tmp_path, *names)
    (tmp_path / "README.md").write_text(CARD, encoding="utf-8")
    assert read(tmp_path, subset="main", split="test") == ["main/test-0.jsonl"]
    assert read(tmp_path, subset="socratic") == ["socratic/x.parquet"]
    assert read(tmp_path, subset="folder", split="test") == ["main/test-0.jsonl"]
    with pytest.raises(ProblemsError, match=r"give a subset; its README\.md names main, socratic, folder"):
        read(tmp_path)
    with pytest.raises(ProblemsError, match=r"no subset 'other'; its README\.md names main"):
        read(tmp_path, subset="other")
    (tmp_path / "README.md").write_text(CARD.replace("main\n", "default\n", 1), encoding="utf-8")
    assert read(tmp_path, split="test") == ["main/test-0.jsonl"]
    (tmp_path / "README.md").write_text("---\n: [\n---\n", encoding="utf-8")
    with pytest.raises(ProblemsError, match=r"README\.md cannot be read as a dataset card"):
        read(tmp_path)


def test_the_files_that_make_up_a_folder_are_those_that_may_be_read(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl", "r.csv", ".hidden.jsonl", "sub/b.jsonl", "README.md")
    config = ProblemsConfig.model_validate({"benchmark": "dataset", "sources": [{"path": str(tmp_path)}]})
    assert config.files() == [tmp_path / name for name in ("README.md", "a.jsonl", "sub/b.jsonl")]


def test_a_path_that_cannot_be_looked_at_is_one_line(tmp_path: Path) -> None:
    for name in ("x" * 300, "x" * 300 + ".jsonl"):
        with pytest.raises(ProblemsError, match=r"cannot be read \(File name too long\)"):
            read(tmp_path / name)


def test_a_folder_inside_that_cannot_be_listed_is_not_left_out_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for another user; root can list every folder."""
    make(tmp_path, "train/a.jsonl", "locked/train/b.jsonl")
    scan = os.scandir

    def refuse(path: str | Path) -> Any:
        if Path(path).name == "locked":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ProblemsError, match=r"locked cannot be read \(Permission denied\)"):
        read(tmp_path)
