"""Data sets of a stage, as inputs of its run."""

from pathlib import Path

from dparallel.config.problems import ProblemsConfig
from dparallel.config.sources import SourceConfig
from dparallel.stages.manifest import Manifest
from tasks.tracking.datasets import of_stage


def test_problems_of_local_files_are_named(tmp_path: Path) -> None:
    """The path of a local file is among the settings that do not determine the result."""
    rows = tmp_path / "rows.jsonl"
    rows.touch()
    problems = ProblemsConfig(
        benchmark="dataset", sources=(SourceConfig(path=str(rows), reference="answer"),)
    )
    made = Manifest(
        stage="trajectories",
        config={"problems": problems.what()},
        how={"problems": problems.how()},
        inputs={},
        files={},
        seconds=1.0,
        finished_at="2026-11-26T12:00:00+00:00",
    )
    [found] = of_stage(made, tmp_path, {})
    assert found.dataset.name == str(rows)
    assert [tag.value for tag in found.tags] == ["trajectories"]
