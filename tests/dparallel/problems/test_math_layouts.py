"""MATH's test problems in every layout in which they are handed on, read by `path`."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dparallel.config.files import load_config
from dparallel.config.problems import ProblemsConfig
from dparallel.config.protocol import ProtocolConfig
from dparallel.problems.sources import ProblemsError, dataset_problems
from tests.conftest import ROOT

SUBJECTS = {  # problems of each subject in the fixture
    "algebra": 3,
    "counting_and_probability": 1,
    "geometry": 2,
    "intermediate_algebra": 1,
    "number_theory": 2,
    "prealgebra": 1,
    "precalculus": 1,
}
ROWS = {
    subject: [
        {
            "problem": f"What is ${number}+{number}$ in {subject}?",
            "level": "Level 1",
            "type": subject.replace("_", " ").title(),
            "solution": rf"It is $\boxed{{{2 * number}}}$.",
        }
        for number in range(1, count + 1)
    ]
    for subject, count in SUBJECTS.items()
}


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def one_file(folder: Path) -> Path:
    write_jsonl(folder / "math_test.jsonl", [row for rows in ROWS.values() for row in rows])
    return folder


def files_of_subjects(folder: Path) -> Path:
    for subject, rows in ROWS.items():
        write_jsonl(folder / f"{subject}.jsonl", rows)
    return folder


def parquet_of_the_hub(folder: Path) -> Path:
    for subject, rows in ROWS.items():
        for split, part in {"test": rows, "train": rows[:1] * 5}.items():
            path = folder / subject / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(part), path)
    return folder


def parquet_with_a_card(folder: Path) -> Path:
    parquet_of_the_hub(folder)
    card = ["---", "configs:"]
    for subject in SUBJECTS:
        card += [f"- config_name: {subject}", "  data_files:"]
        for split in ("train", "test"):
            card += [f"  - split: {split}", f"    path: {subject}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*card, "---", "# MATH", ""]), encoding="utf-8")
    return folder


def archive(folder: Path, indent: int | None = 4) -> Path:
    """As extracted: MATH/test/algebra/1.json and MATH/train/…, an object in each file."""
    for split in ("test", "train"):
        for subject, rows in ROWS.items():
            for number, row in enumerate(rows, 1):
                path = folder / "MATH" / split / subject / f"{number}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                row = row if split == "test" else {**row, "problem": "of training"}
                path.write_text(json.dumps(row, indent=indent), encoding="utf-8")
    return folder / "MATH"


def archive_of_single_lines(folder: Path) -> Path:
    return archive(folder, indent=None)


def only_the_test_split(folder: Path) -> Path:
    return archive(folder) / "test"


@pytest.mark.parametrize(
    "layout",
    [
        one_file,
        files_of_subjects,
        parquet_of_the_hub,
        parquet_with_a_card,
        archive,
        archive_of_single_lines,
        only_the_test_split,
    ],
    ids=lambda layout: layout.__name__,
)
@pytest.mark.parametrize("name", ["math_llada", "math_dream"])
def test_every_layout_gives_the_test_problems(
    layout: Callable[[Path], Path], name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    protocol = load_config(ProtocolConfig, ROOT / "configs" / "protocols" / f"{name}.yaml")
    path = layout(tmp_path)
    problems = dataset_problems(ProblemsConfig(benchmark="dataset", protocol=protocol, path=str(path)))
    expected = [row for rows in ROWS.values() for row in rows]
    assert [problem.prompt for problem in problems] == [
        f"Problem:\n{row['problem']}\n\nSolution:" for row in expected
    ]
    assert [problem.reference for problem in problems] == [row["solution"] for row in expected]
    assert len({problem.problem_id for problem in problems}) == len(problems)
    assert f"{path} holds 11 problems, and the published data set 5000: " in caplog.text


def test_a_subject_that_is_missing_is_named(tmp_path: Path) -> None:
    protocol = load_config(ProtocolConfig, ROOT / "configs" / "protocols" / "math_llada.yaml")
    path = files_of_subjects(tmp_path)
    (path / "geometry.jsonl").unlink()
    with pytest.raises(ProblemsError, match="no subset 'geometry'"):
        dataset_problems(ProblemsConfig(benchmark="dataset", protocol=protocol, path=str(path)))
