"""Data sets of a stage, as inputs of its run."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag

from dparallel.config.problems import ProblemsConfig
from dparallel.config.sources import SourceConfig
from dparallel.stages.manifest import Manifest
from tasks.tracking.content import log_inputs
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


@pytest.mark.slow
def test_runs_that_register_a_data_set_at_once_all_have_it(store: MlflowClient) -> None:
    runs = [store.create_run("0").info.run_id for _ in range(4)]
    together = Barrier(len(runs))

    def register(run: str) -> None:
        for number in range(10):
            made = Dataset(name="a", digest=str(number), source_type="local", source="{}")
            together.wait(60)
            log_inputs(store, run, [DatasetInput(made, [InputTag("mlflow.data.context", "training")])])

    with ThreadPoolExecutor(len(runs)) as pool:
        list(pool.map(register, runs))
    for run in runs:
        assert len(store.get_run(run).inputs.dataset_inputs) == 10
