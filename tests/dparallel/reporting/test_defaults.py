"""What a benchmark chose becomes the decode defaults of the students' checkpoints."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dparallel.config.experiment import MergingConfig
from dparallel.models.defaults import read_defaults
from dparallel.reporting.defaults import choices, write_choices
from dparallel.reporting.read import Benchmark, read_benchmark
from dparallel.stages.generation_file import GENERATION, KEY
from dparallel.stages.manifest import Stage, fingerprint, verify
from tests.dparallel.reporting.made import finished_benchmark

CHOSEN = {"benchmark": "sums", "split": "validation", "problems": 5, "accuracy": 0.6, "nfe": 3.0}


def measured(teacher: Path, tmp_path: Path, generation: str | None = None) -> tuple[Benchmark, Path]:
    """A finished benchmark of a merged student, whose stage lists this generation_config.json."""
    folder = tmp_path / "runs" / "sums" / "merging-fast"
    stage = Stage("merging", MergingConfig(), {}, folder)
    for file in teacher.iterdir():
        shutil.copyfile(file, folder / file.name)
    if generation is not None:
        (folder / GENERATION).write_text(generation, encoding="utf-8")
    stage.finish(file.name for file in folder.iterdir() if file.name != "stage.json")
    found = finished_benchmark(tmp_path / "runs", teacher, merged=folder)
    return read_benchmark("sums", found), folder


@pytest.mark.parametrize("generation", [None, '{\n  "eos_token_id": 2\n}\n'])
def test_the_chosen_decoding_is_written_and_the_model_stays_what_it_is(
    generation: str | None, tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    benchmark, folder = measured(tiny_checkpoint, tmp_path, generation)
    before = fingerprint(folder)
    with caplog.at_level(logging.INFO):
        assert write_choices(benchmark) == [str(folder)]
    assert "student/fast: decode defaults as chosen in benchmark sums: validation: " in caplog.text
    [row] = [row for _, row in choices(benchmark)]
    found = read_defaults(folder)
    assert found.decoding() == row.measurement.decoding
    assert found.settings == {
        "gen_length": 12,
        "block_length": 6,
        "rule": "entropy",
        "threshold": 0.5,
        "mode": "sequential",
        "cache": "none",
        "stop_at_eos": True,
    }
    assert found.chosen == {**CHOSEN, "keeps_accuracy": True}
    assert fingerprint(folder) == before
    verify(folder, "merging")
    if generation is not None:
        assert json.loads((folder / GENERATION).read_bytes())["eos_token_id"] == 2
    assert write_choices(benchmark) == [], "a second time changes nothing"


def test_a_file_in_another_layout_is_left_alone(
    tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its manifest would no longer hold."""
    benchmark, folder = measured(tiny_checkpoint, tmp_path, '{"eos_token_id": 2}')
    assert write_choices(benchmark) == []
    assert "was edited, or merged by an earlier version" in caplog.text
    assert KEY not in json.loads((folder / GENERATION).read_bytes())
    verify(folder, "merging")


def test_of_several_sweeps_the_fastest_that_keeps_the_accuracy_counts(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    benchmark, _ = measured(tiny_checkpoint, tmp_path)
    [row] = [row for _, row in choices(benchmark)]
    faster = row.measurement.model_copy(update={"tpf": row.measurement.tpf * 2, "nfe": 1.5})
    other = replace(row, method="other", measurement=faster)
    worse = replace(row, method="worse", measurement=faster, qualifies=False)
    rows = [*benchmark.rows, other, worse]
    assert dict(choices(replace(benchmark, rows=rows))) == {"student/fast": other}
    test = [each for each in rows if each.split == "test"]
    given = replace(benchmark, rows=[*test, replace(other, split="test")])
    [(_, first)] = choices(given)
    assert first.method == "entropy", "the first sweep: test problems choose nothing"


def test_models_that_no_stage_made_are_not_written_to(tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = finished_benchmark(tmp_path / "runs", tiny_checkpoint)
    assert write_choices(read_benchmark("sums", found)) == []
    assert not (tiny_checkpoint / GENERATION).exists()
