"""The benchmark on a work pool, with a thread in place of its workers."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from prefect import get_client
from prefect.client.schemas.objects import FlowRun, State, StateType

from dparallel.config.experiment import DistillConfig
from dparallel.config.files import load_config
from dparallel.stages.experiment import Experiment, StagePlan
from dparallel.stages.manifest import Stage, StageError
from flows.benchmark import benchmark, measurements
from flows.dispatch import dispatch_all
from tests.dparallel.evaluation.oracle import disturbed

pytestmark = pytest.mark.usefixtures("prefect_server")

TWO_SLICES = ["benchmarks.coins.validation.count=66", "benchmarks.coins.batch_size=16"]


@pytest.fixture(scope="module", autouse=True)
def part(prefect_server: None) -> None:
    measurements.to_deployment(name="measure-part").apply()


@pytest.fixture(autouse=True)
def polled_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.dispatch.dispatch_all", partial(dispatch_all, poll_seconds=0.1))


@pytest.fixture(autouse=True)
def one_student(config_file: Path) -> None:
    small = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    del small["students"]["no_certainty"]
    config_file.write_text(yaml.safe_dump(small), encoding="utf-8")


def settings(config_file: Path, runs: str) -> list[str]:
    """Overrides for an experiment in the folder `runs`, with models in place of merged ones."""
    overrides = [*TWO_SLICES, f"runs={config_file.parent / runs}"]
    experiment = Experiment(load_config(DistillConfig, config_file, overrides))
    teacher = Path(experiment.config.teacher)
    finish(experiment.trajectories())
    for student in experiment.config.students:
        finish(experiment.training(student))
        finish(experiment.merging(student), disturbed(teacher, config_file.parent / f"{runs}-{student}"))
    return overrides


def finish(plan: StagePlan, model: Path | None = None) -> None:
    """A finished stage with a model or without files."""
    stage = Stage(plan.stage, plan.settings(), plan.inputs, plan.out_dir)
    files = [] if model is None else [file for file in model.iterdir() if file.is_file()]
    stage.finish([Path(shutil.copy(file, stage.folder)).name for file in files])


def parts(config_file: Path) -> list[FlowRun]:
    """The dispatched runs for a config, the oldest first."""
    with get_client(sync_client=True) as client:
        runs = [run for run in client.read_flow_runs() if run.deployment_id is not None]
    mine = [run for run in runs if str(config_file) in str(run.parameters.get("config"))]
    return sorted(mine, key=lambda run: (run.created, run.name))


@contextmanager
def worker(config_file: Path, dies_at: set[int]) -> Iterator[None]:
    """Runs one part after another; parts whose index is in `dies_at` crash before their last unit."""
    stopped = threading.Event()

    def work() -> None:
        done = 0
        while not stopped.is_set():
            for run in parts(config_file):
                if run.state is None or run.state.is_final():
                    continue
                dies = done in dies_at
                units = run.parameters["units"]
                measurements(**{**run.parameters, "units": units[:-1] if dies else units})
                state = State(type=StateType.CRASHED if dies else StateType.COMPLETED, message="exit code -9")
                with get_client(sync_client=True) as client:
                    client.set_flow_run_state(run.id, state, force=True)
                done += 1
            time.sleep(0.1)

    thread = threading.Thread(target=copy_context().run, args=(work,))  # the context holds the tests' server
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def results(folder: str) -> list[dict[str, Any]]:
    rows = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))["rows"]
    timed = ("tps", "latency", "measured_on", "reused")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


@pytest.mark.slow
def test_what_a_dead_worker_left_is_redone_and_the_results_are_a_local_runs(
    config_file: Path, local_store: str
) -> None:
    overrides = [*settings(config_file, "shared"), "launch.parts=2"]
    with worker(config_file, dies_at={0}):
        [folder] = benchmark(str(config_file), overrides, on_pool=True)
    runs = parts(config_file)
    one, other, redone, *test = [run.parameters["units"] for run in runs]
    assert [run.name for run in runs][:2] == [
        "small: measurements coins, part 1 of 2",
        "small: measurements coins, part 2 of 2",
    ]
    assert not [unit for unit in one if unit in other]
    assert redone == one[-1:], "what the dead one did not come to"
    assert len(test) == 2
    (experiment,) = MlflowClient(tracking_uri=local_store).search_experiments(filter_string="name = 'small'")
    (tracked,) = MlflowClient(tracking_uri=local_store).search_runs([experiment.experiment_id])
    assert (tracked.info.run_name, tracked.info.status) == (
        "small: benchmark coins (batch_size=16, count=66, parts=2)",
        "FINISHED",
    )

    [alone] = benchmark(str(config_file), settings(config_file, "local"))
    assert results(folder) == results(alone)


@pytest.mark.slow
def test_a_part_that_always_dies_is_named_and_the_rerun_only_adds(
    config_file: Path, local_store: str
) -> None:
    overrides = settings(config_file, "runs")
    with (
        worker(config_file, dies_at={0, 1, 2}),
        pytest.raises(StageError, match=r"1 of \d+ units .*coins, part 1 of 1' .*exit code -9"),
    ):
        benchmark(str(config_file), overrides, on_pool=True)
    failed = [run.parameters["units"] for run in parts(config_file)]
    assert [len(each) for each in failed[1:]] == [1, 1]
    with worker(config_file, dies_at=set()):
        benchmark(str(config_file), overrides, on_pool=True)
    validation, test = [run.parameters["units"] for run in parts(config_file)][3:]
    assert validation == failed[-1]
    assert len([unit for unit in test if unit["kind"] == "certainty"]) == 2
