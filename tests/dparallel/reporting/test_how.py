"""What a report says of how it was measured, and of a row beside itself."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from dparallel.reporting.read import read_benchmark
from dparallel.reporting.report import write_report
from dparallel.reporting.summary import _pair
from dparallel.reporting.tables import differences, paired_notes
from dparallel.stages.manifest import Manifest
from tests.dparallel.reporting.made import MEASUREMENTS, finished_benchmark


def test_settings_and_command_are_in_the_report(tiny_checkpoint: Path, tmp_path: Path) -> None:
    stage = finished_benchmark(tmp_path, tiny_checkpoint)
    write_report("sums", [("sums", stage)], tmp_path / MEASUREMENTS, {}, tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    [run] = report["benchmarks"][0]["runs"]
    assert run["started_with"] == "'settings of a script'"
    assert run["decodings"]["fast, entropy"] == {
        "gen_length": 12,
        "block_length": 6,
        "rule": "entropy",
        "threshold": 0.5,
    }
    assert run["decodings"]["teacher, one token per step"]["steps"] == 12
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "<dt>decoding: fast, entropy</dt><dd>gen_length 12, block_length 6, rule entropy" in page
    assert "<dt>started with</dt>" in page


def test_the_training_of_a_student_is_found_by_what_its_model_was_made_from(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    facts: dict[str, Any] = {"files": {}, "seconds": 1.0, "finished_at": "2026-11-26T00:00:00+00:00"}
    wanted, other = (
        Manifest(stage="training", config={"train_steps": steps}, inputs={}, **facts) for steps in (5, 6)
    )
    merged = Manifest(stage="merging", config={}, inputs={"training": wanted.fingerprint}, **facts)
    for name, manifest in {"training-a": other, "training-b": wanted, "merging-a": merged}.items():
        (tmp_path / "sums" / name).mkdir(parents=True)
        (tmp_path / "sums" / name / "manifest.json").write_text(manifest.model_dump_json(), encoding="utf-8")
    benchmark = read_benchmark("sums", finished_benchmark(tmp_path, tiny_checkpoint, with_models=False))
    models = {"teacher": str(tiny_checkpoint), "student/fast": str(tmp_path / "sums" / "merging-a")}
    assert replace(benchmark, models=models).training() == {"student/fast": {"train_steps": 5}}


def test_a_measurement_beside_itself_is_not_tested(tiny_checkpoint: Path, tmp_path: Path) -> None:
    benchmark = read_benchmark("sums", finished_benchmark(tmp_path, tiny_checkpoint))
    teacher = (benchmark, benchmark.reference)
    pair = _pair(teacher, teacher)
    assert (pair["test"], pair["problems"], pair["difference"], pair["p_value"]) == ("same", 5, 0.0, None)
    section = {"benchmark": "sums", "paired": [pair]}
    [cells] = differences(section).cells
    assert cells[-2:] == ["the same samples", ""]
    assert "both rows are one measurement, and there is nothing to test" in paired_notes(section)[0]
