"""Runs on servers and workers: their processes are killed, their servers go away, they are cancelled."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deploy.local.processes import Processes, stop
from flows.dispatch import DEPLOYMENTS
from tests.failures.experiment import copy_before, results, temporary_files
from tests.failures.local import SECONDS, running, wait_until
from tests.failures.stack import Stack
from tests.failures.table import Row
from tests.failures.test_signals import LOST, is_in_the_middle
from tests.failures.test_twins import waits

TRAINING = "training on a worker"
NOT_NEEDED = "not needed"


@pytest.fixture(scope="module")
def stack(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, reference: Path
) -> Iterator[Stack]:
    """Servers, a cpu and a gpu worker."""
    made = Stack(tmp_path_factory.mktemp("clone"), tiny_checkpoint)
    try:
        made.up()
        yield made
        made.down()
    finally:
        stop(Processes(made.clone.folder / ".dparallel").records().values(), seconds=0)


@dataclass(frozen=True)
class Case:
    """A folder of runs for a case, in which all stages before one are finished."""

    stack: Stack
    runs: Path
    config: Path
    name: str
    stage: str
    undisturbed: dict[str, str]

    def submit(self, deployment: str = "distill/full", **parameters: Any) -> str:
        return self.stack.submit(deployment, self.config, **parameters)

    def wait_for_the_middle(self) -> None:
        wait_until(
            lambda: is_in_the_middle(self.runs, self.stage), lambda: self.stack.log("gpu-1"), 2 * SECONDS
        )

    def first_of(self, flow: str) -> dict[str, Any]:
        """The first run of a flow."""
        return self.runs_of(flow)[0]

    def runs_of(self, flow: str) -> list[dict[str, Any]]:
        """The runs of a flow; their names begin with the experiment's."""
        return [run for run in self.stack.runs_in(self.runs) if f": {flow}" in run["name"]]

    def is_undisturbed(self, until: str = "benchmark") -> None:
        """The results up to a stage are those of an undisturbed run, and no temporary file is left."""
        found = results(self.runs)
        assert found == {name: self.undisturbed[name] for name in found}
        assert any(name.startswith(f"{until}-") for name in found)
        assert temporary_files(self.runs) == []

    def same_again(self) -> None:
        self.stack.up()
        run = self.submit()
        assert self.stack.ends(run)[0] == "COMPLETED"
        self.is_undisturbed()


@pytest.fixture
def case(
    tmp_path: Path, reference: Path, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Case]]:
    """Prepares a case: all stages before the named one are finished."""
    stack.up()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stack.mlflow)
    runs, name = tmp_path / "runs", f"case-{time.monotonic_ns()}"

    def prepare(stage: str) -> Case:
        copy_before(reference / "runs", runs, stage)
        (runs / "small").rename(runs / name)
        config = stack.config(runs, name=name)
        return Case(stack, runs, config, name, stage, results(reference / "runs"))

    yield prepare
    stack.up()
    for run in stack.runs_in(runs):
        if run["state_type"] not in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            stack.ask(f"flow_runs/{run['id']}/set_state", {"state": {"type": "CANCELLED"}, "force": True})
    for process in stack.processes(str(runs)):
        with contextlib.suppress(Exception):
            process.kill()
    shutil.rmtree(runs, ignore_errors=True)


def kill(stack: Stack, name: str) -> None:
    """Kill a server or a worker of the stack."""
    os.kill(stack.clone.pids()[name], signal.SIGKILL)


def test_the_worker_is_killed(case: Callable[[str], Case], shown: Callable[[Row], None]) -> None:
    made = case("training")
    run = made.submit()
    made.wait_for_the_middle()
    kill(made.stack, "gpu-1")
    wait_until(lambda: made.first_of("training")["state_type"] == "CRASHED", lambda: made.stack.log("cpu-1"))
    wait_until(lambda: not made.stack.processes("dparallel.distillation"), lambda: "training goes on")
    made.stack.up()
    assert made.stack.ends(run)[0] == "COMPLETED"
    assert [other["state_type"] for other in made.runs_of("training")] == ["CRASHED", "COMPLETED"]
    made.is_undisturbed()
    outcome = "training's processes end, its run is Crashed, is started again, and waits for a worker"
    shown(Row("SIGKILL of the gpu worker", TRAINING, outcome, LOST["training"], NOT_NEEDED))


def test_the_flows_process_on_a_worker_is_killed(
    case: Callable[[str], Case], shown: Callable[[Row], None]
) -> None:
    made = case("training")
    run = made.submit()
    made.wait_for_the_middle()
    for process in made.stack.flow_processes(made.first_of("training")["id"])[:1]:
        process.kill()
    assert made.stack.ends(run)[0] == "COMPLETED"
    assert [other["state_type"] for other in made.runs_of("training")] == ["CRASHED", "COMPLETED"]
    made.is_undisturbed()
    outcome = "the training's run is Crashed, and is started again"
    shown(Row("SIGKILL of the training's flow run", TRAINING, outcome, LOST["training"], NOT_NEEDED))


def test_the_flow_that_waits_is_killed(case: Callable[[str], Case], shown: Callable[[Row], None]) -> None:
    made = case("training")
    run = made.submit()
    made.wait_for_the_middle()
    for process in made.stack.flow_processes(run)[:1]:
        process.kill()
    assert made.stack.ends(run)[0] == "CRASHED"
    made.same_again()
    assert {other["state_type"] for other in made.runs_of("training")} == {"COMPLETED"}
    outcome = "Crashed; the training on the other pool goes on, and the rerun joins it or finds its result"
    shown(Row("SIGKILL of `distill/full`'s flow run", TRAINING, outcome))


@pytest.mark.parametrize(("stage", "part"), [("trajectories", "shards"), ("benchmark", "measurements")])
def test_a_part_is_killed(
    case: Callable[[str], Case], shown: Callable[[Row], None], stage: str, part: str
) -> None:
    made = case(stage)
    run = made.submit(DEPLOYMENTS[stage], overrides=["launch.parts=2"], on_pool=True)
    made.wait_for_the_middle()
    for process in made.stack.flow_processes(made.first_of(part)["id"])[:1]:
        process.kill()
    assert made.stack.ends(run)[0] == "COMPLETED"
    states = [other["state_type"] for other in made.runs_of(part)]
    assert "CRASHED" in states
    made.is_undisturbed(stage)
    what = "shard" if stage == "trajectories" else "slice"
    outcome = "the run has the rest made by other parts, and completes"
    shown(
        Row(
            f"SIGKILL of a part (`{DEPLOYMENTS[part]}`)",
            stage,
            outcome,
            f"the {what} in progress",
            NOT_NEEDED,
        )
    )


def test_prefects_server_is_killed_and_comes_back(
    case: Callable[[str], Case], shown: Callable[[Row], None]
) -> None:
    made = case("training")
    run = made.submit()
    made.wait_for_the_middle()
    kill(made.stack, "prefect")
    time.sleep(5)
    made.stack.up()
    assert made.stack.ends(run)[0] == "COMPLETED"
    made.is_undisturbed()
    outcome = "the run goes on without it, and completes when it is back"
    shown(Row("SIGKILL of Prefect's server", TRAINING, outcome, rerun=NOT_NEEDED))


def test_mlflows_server_is_killed_and_comes_back(
    case: Callable[[str], Case], shown: Callable[[Row], None]
) -> None:
    made = case("training")
    run = made.submit()
    made.wait_for_the_middle()
    kill(made.stack, "mlflow")
    time.sleep(5)
    made.stack.up()
    assert made.stack.ends(run)[0] == "COMPLETED"
    made.is_undisturbed()
    made.stack.upload(made.runs)
    statuses = made.stack.statuses(made.name)
    assert {status for of_stage in statuses.values() for status in of_stage} == {"FINISHED"}, statuses
    assert set(statuses) == {"distill", "trajectories", "training", "merging", "benchmark"}
    outcome = "the run completes; what waits is uploaded when the server is back"
    shown(Row("SIGKILL of MLflow's server", TRAINING, outcome, rerun=NOT_NEEDED))


def test_mlflows_server_is_away_and_comes_back(
    case: Callable[[str], Case], shown: Callable[[Row], None]
) -> None:
    made = case("merging")
    kill(made.stack, "mlflow")
    run = made.submit()
    assert made.stack.ends(run)[0] == "COMPLETED"
    made.is_undisturbed()
    made.stack.up()
    made.stack.upload(made.runs)
    statuses = made.stack.statuses(made.name)
    assert {status for of_stage in statuses.values() for status in of_stage} == {"FINISHED"}, statuses
    outcome = "the run completes with warnings; `python -m tasks.tracking upload` uploads all of it"
    shown(Row("MLflow's server away", "merging, benchmark", outcome, rerun=NOT_NEEDED))


def cancel_by_command(stack: Stack, run: str) -> None:
    stack.clone.run("prefect", "flow-run", "cancel", run)


def cancel_by_page(stack: Stack, run: str) -> None:
    """The request that Prefect's page sends."""
    stack.ask(f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})


CANCELS = {"`prefect flow-run cancel`": cancel_by_command, "cancel on Prefect's page": cancel_by_page}


@pytest.mark.parametrize("how", CANCELS, ids=["command", "page"])
def test_a_run_is_cancelled(case: Callable[[str], Case], shown: Callable[[Row], None], how: str) -> None:
    made = case("training")
    run = made.submit()
    made.wait_for_the_middle()
    CANCELS[how](made.stack, run)
    wait_until(
        lambda: not made.stack.processes("dparallel.distillation"), lambda: "training goes on", SECONDS
    )
    assert made.stack.ends(run)[0] == "CANCELLED"
    made.stack.quiet(made.runs)
    assert {other["state_type"] for other in made.stack.runs_in(made.runs)} == {"CANCELLED"}
    made.stack.upload(made.runs)
    statuses = made.stack.statuses(made.name)
    assert statuses["distill"] == statuses["training"] == ["KILLED"]
    made.same_again()
    outcome = "the dispatched run is cancelled too, training's processes end, killed in MLflow"
    shown(Row(how, TRAINING, outcome, LOST["training"]))


def test_two_runs_of_distill_at_once(case: Callable[[str], Case], shown: Callable[[Row], None]) -> None:
    made = case("trajectories")
    runs = [made.submit(on_pools=["trajectories", "training", "benchmark"]) for _ in range(2)]
    assert [made.stack.ends(run)[0] for run in runs] == ["COMPLETED", "COMPLETED"]
    made.is_undisturbed()
    outcome = "both complete; dispatched runs are shared, other stages wait for each other"
    shown(Row("`distill/full` twice at once", "all", outcome, rerun=NOT_NEEDED))


def test_a_local_run_beside_a_dispatched_one(
    case: Callable[[str], Case], shown: Callable[[Row], None], tmp_path: Path
) -> None:
    made = case("training")
    run = made.submit()
    made.wait_for_the_middle()
    training = made.stack.processes("dparallel.distillation")
    for process in training:
        process.suspend()
    command = ["flows.training", "-v", "--config", str(made.config)]
    with running(command, tmp_path, {"PREFECT_API_URL": made.stack.api}) as local:
        local.wait_until(lambda: waits(local.said))
        for process in training:
            process.resume()
        assert local.code() == 0, local.said
    assert made.stack.ends(run)[0] == "COMPLETED"
    made.is_undisturbed()
    outcome = "the local run says that it waits, then uses the result"
    shown(Row("the same training dispatched and local", TRAINING, outcome, rerun=NOT_NEEDED))


def test_a_worker_without_the_address_of_mlflow(
    case: Callable[[str], Case], shown: Callable[[Row], None], tmp_path: Path
) -> None:
    made = case("training")
    stop([Processes(made.stack.clone.folder / ".dparallel").records()["gpu-1"]])
    environment = {
        **os.environ,
        "PREFECT_API_URL": made.stack.api,
        "PYTHONPATH": str(made.stack.clone.folder),
    }
    environment |= {"PREFECT_WORKER_QUERY_SECONDS": "2", "OMP_NUM_THREADS": "1"}
    del environment["MLFLOW_TRACKING_URI"]
    command = [
        sys.executable,
        "-m",
        "prefect",
        "worker",
        "start",
        "--pool",
        "gpu",
        "--name",
        "bare",
        "--limit",
        "1",
    ]
    with (tmp_path / "worker.log").open("wb") as log:
        worker = subprocess.Popen(
            command,
            cwd=made.stack.clone.folder,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        assert made.stack.ends(made.submit())[0] == "COMPLETED"
    finally:
        os.killpg(worker.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
    made.is_undisturbed()
    assert not (made.stack.clone.folder / "mlflow.db").exists(), "a store of its own"
    statuses = made.stack.statuses(made.name)
    assert statuses["training"] == ["FINISHED"]
    outcome = "its runs go where the experiment's run is"
    shown(Row("a worker without `MLFLOW_TRACKING_URI`", TRAINING, outcome, rerun=NOT_NEEDED))
