"""A benchmark without validation problems measures thresholds as given, and chooses nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dparallel.config.base import ConfigError
from dparallel.config.experiment import BenchmarkConfig
from dparallel.evaluation.stage import run_stage
from dparallel.reporting.aup import anchor
from dparallel.reporting.read import read_benchmark
from dparallel.reporting.report import write_report
from tests.dparallel.evaluation.oracle import disturbed

SHAPE = {"gen_length": 12, "block_length": 6}


def settings(*thresholds: float, **changes: Any) -> BenchmarkConfig:
    sweeps = {"entropy": {"decoding": SHAPE, "thresholds": thresholds}}
    return BenchmarkConfig.model_validate(
        {
            "test": {"benchmark": "coins", "split": "test", "count": 6},
            "reference": {**SHAPE, "rule": "steps", "steps": 12},
            "sweeps": sweeps,
            "teacher_sweeps": ["entropy"],
            "student_sweeps": ["entropy"],
            **changes,
        }
    )


def test_thresholds_are_measured_as_given(tiny_checkpoint: Path, tmp_path: Path) -> None:
    students = {f"student/{name}": disturbed(tiny_checkpoint, tmp_path / name) for name in ("one", "two")}
    inputs = {"teacher": str(tiny_checkpoint), **{name: str(path) for name, path in students.items()}}
    folder = tmp_path / "runs" / "experiment" / "benchmark-coins-0123456789"
    run_stage(settings(2.0), inputs, folder, tmp_path / "runs" / "measurements")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert [(row["model"], row["split"], row["operating_point"]) for row in results["rows"]] == [
        ("teacher", "test", False),
        ("teacher", "test", True),
        ("student/one", "test", True),
        ("student/two", "test", True),
    ]
    assert results["default_student"] is None
    assert results["headline"]["student"]["model"] == "student/one", "the first of the config"
    assert {entry["split"] for entry in results["aup"]} == {"test"}
    table = (folder / "table.md").read_text(encoding="utf-8")
    assert "No default student: none is chosen without validation problems." in table
    assert "Test problems; thresholds as given." in table
    assert "(default)" not in table
    read = read_benchmark("coins", folder)
    assert [row.model for row in read.reported] == ["teacher", "teacher", "student/one", "student/two"]
    assert read.default_student is None
    write_report("sums", [("coins", folder)], folder.parents[1] / "measurements", inputs, tmp_path / "report")
    report = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "Thresholds are as given, and measured on test problems." in report
    assert "(default)" not in report


def test_students_are_measured_with_fixed_decodings_too(tiny_checkpoint: Path, tmp_path: Path) -> None:
    few = {"fixed": {"few_step": {**SHAPE, "rule": "steps", "steps": 4}}}
    config = settings(2.0, **few, student_fixed={"one": ["one_token_per_step", "few_step"]})
    inputs = {
        "teacher": str(tiny_checkpoint),
        "student/one": str(disturbed(tiny_checkpoint, tmp_path / "one")),
    }
    folder = tmp_path / "runs" / "experiment" / "benchmark-coins-0123456789"
    run_stage(config, inputs, folder, tmp_path / "runs" / "measurements")
    read = read_benchmark("coins", folder)
    assert [(row.model, row.method) for row in read.reported] == [
        ("teacher", "one_token_per_step"),
        ("teacher", "few_step"),
        ("student/one", "one_token_per_step"),
        ("student/one", "few_step"),
        ("teacher", "entropy"),
        ("student/one", "entropy"),
    ]
    student = read.reported[-1]
    assert anchor(read, student) == read.reported[2], "the student's own decoding with one token per step"
    with pytest.raises(
        ValidationError, match="student_fixed.one: unknown 'fast'; known: one_token_per_step, few"
    ):
        settings(2.0, **few, student_fixed={"one": ["fast"]})
    with pytest.raises(ConfigError, match="student_fixed lists 'two'; the students are one"):
        settings(2.0, **few, student_fixed={"two": ["few_step"]}).check_students(["one"])
    lists = {"one": ["entropy"], "two": ["entropy"]}
    settings(2.0, **few, student_sweeps=lists, student_fixed={"two": ["few_step"]}).check_students(["one"])


def test_a_threshold_to_choose_needs_validation_problems() -> None:
    with pytest.raises(ValidationError, match=r"thresholds=\[0.5, 2.0\] without validation: give"):
        settings(0.5, 2.0)


def test_what_chooses_a_threshold_is_what_is_reported() -> None:
    sources = [{"path": "rows.jsonl"}]
    test, validation = (
        {"benchmark": "dataset", "sources": sources, "protocol": {"scorers": [scorer]}}
        for scorer in ("exact", "flexible_extract")
    )
    with pytest.raises(
        ValidationError, match="test is judged by 'exact' and validation by 'flexible_extract'"
    ):
        settings(0.5, test=test, validation=validation)


def test_students_without_a_sweep_are_refused() -> None:
    with pytest.raises(ConfigError, match="benchmarks.coins.student_sweeps is empty, so no student"):
        settings(0.5, student_sweeps=()).check_students(["one"], "benchmarks.coins")


def test_a_block_causal_student_alone_is_compared_with_its_teacher(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The teacher cannot be decoded as the student is; its certainty is shown with the student's rule."""
    student = disturbed(tiny_checkpoint, tmp_path / "student")
    config = json.loads((student / "config.json").read_text(encoding="utf-8"))
    (student / "config.json").write_text(json.dumps({**config, "attention_pattern": "block_causal"}), "utf-8")
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_checkpoint, teacher)
    (teacher / "config.json").write_text(json.dumps({**config, "attention_pattern": "full"}), "utf-8")
    pipelined = {"decoding": {**SHAPE, "mode": "pipelined", "rule": "contiguous"}, "thresholds": [0.5]}
    asked = settings(sweeps={"pipelined": pipelined}, teacher_sweeps=[], student_sweeps=["pipelined"])
    folder = tmp_path / "runs" / "experiment" / "benchmark-coins-0123456789"
    inputs = {"teacher": str(teacher), "student/s": str(student)}
    manifest = run_stage(asked, inputs, folder, tmp_path / "runs" / "measurements")
    assert "certainty.png" in manifest.files
