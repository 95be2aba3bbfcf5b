"""Runs on workers: the workers and their flow runs are ended or cancelled, and twins begin."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.local.processes import Processes, stop
from flows.dispatch import DEPLOYMENTS
from tests.failures.experiment import LOST, STAGES, done_of
from tests.failures.local import SIGNALS, running, wait_until, waits
from tests.failures.stack import NOT_NEEDED, ON_POOLS, TRAINING, Case, Stack
from tests.failures.table import Row

# What the gpu pool works on in a stage, by the name of its flow runs.
PARTS = {"trajectories": "shards", "training": "training", "benchmark": "measurements"}


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("stage", PARTS)
def test_the_gpu_worker_is_ended(
    case: Callable[[str], Case], shown: Callable[[Row], None], stage: str, number: signal.Signals
) -> None:
    made = case(stage)
    run = made.submit("distill/full" if stage == "training" else DEPLOYMENTS[stage])
    made.wait_for_the_middle()
    ended = made.running(PARTS[stage])
    made.stack.end("gpu-1", number)
    made.stack.is_crashed_soon(ended)
    wait_until(lambda: not made.stack.flow_processes(ended), lambda: "the flow run's process goes on")
    wait_until(lambda: not made.stack.processes("dparallel.distillation"), lambda: "training goes on")
    made.stack.up()
    assert made.stack.ends(run)[0] == "COMPLETED"
    states = made.states_of(PARTS[stage])
    assert states.count("CRASHED") == 1
    assert set(states) == {"CRASHED", "COMPLETED"}
    made.is_undisturbed(stage)
    outcome = "its run is Crashed, and the rest is sent again, which waits for a worker"
    what = f"{SIGNALS[number]} of the gpu worker"
    shown(Row(what, f"{stage} on a worker", outcome, LOST[stage], NOT_NEEDED))


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_cpu_worker_is_ended(
    case: Callable[[str], Case], shown: Callable[[Row], None], number: signal.Signals
) -> None:
    """It works on `distill/full`, and in this on the merging."""
    made = case("merging")
    run = made.submit()
    made.wait_for_the_middle()
    made.stack.end("cpu-1", number)
    made.stack.is_crashed_soon(run)
    wait_until(lambda: not made.stack.flow_processes(run), lambda: "the flow run's process goes on")
    made.same_again()
    outcome = "`distill/full` is Crashed"
    shown(Row(f"{SIGNALS[number]} of the cpu worker", "merging on a worker", outcome, LOST["merging"]))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_the_flows_process_on_a_worker_is_killed(
    case: Callable[[str], Case], shown: Callable[[Row], None], number: signal.Signals
) -> None:
    made = case("training")
    run = made.submit()
    made.wait_for_the_middle()
    made.engine(made.running("training")).send_signal(number)
    assert made.stack.ends(run)[0] == "COMPLETED"
    assert made.states_of("training") == ["CRASHED", "COMPLETED"]
    made.is_undisturbed()
    outcome = "the training's run is Crashed, and is started again"
    shown(
        Row(f"{SIGNALS[number]} of the training's flow run", TRAINING, outcome, LOST["training"], NOT_NEEDED)
    )


def test_the_flow_that_waits_is_killed(case: Callable[[str], Case], shown: Callable[[Row], None]) -> None:
    made = case("training")
    run = made.submit()
    made.wait_for_the_middle()
    made.engine(run).kill()
    assert made.stack.ends(run)[0] == "CRASHED"
    made.same_again()
    assert set(made.states_of("training")) == {"COMPLETED"}
    outcome = "Crashed; the training on the other pool goes on, and the rerun joins it or finds its result"
    shown(Row("SIGKILL of `distill/full`'s flow run", TRAINING, outcome))


@pytest.mark.parametrize("stage", ["trajectories", "benchmark"])
def test_parts_are_ended(case: Callable[[str], Case], shown: Callable[[Row], None], stage: str) -> None:
    """One after the other, each with another signal, while it works."""
    made = case(stage)
    part = PARTS[stage]
    run = made.submit(DEPLOYMENTS[stage], overrides=["launch.parts=3"], on_pool=True)
    for number in SIGNALS:
        one = made.running(part)
        engine, done = made.engine(one), done_of(made.runs, stage)
        wait_until(lambda done=done: done_of(made.runs, stage) > done, lambda: made.stack.log("gpu-1"))
        engine.send_signal(number)
        wait_until(
            lambda one=one: made.stack.state(one)["type"] == "CRASHED", lambda: made.stack.log("gpu-1")
        )
    assert made.stack.ends(run)[0] == "COMPLETED"
    states = made.states_of(part)
    assert states.count("CRASHED") == len(SIGNALS)
    assert set(states) == {"CRASHED", "COMPLETED"}
    made.is_undisturbed(stage)
    what = f"{', '.join(SIGNALS.values())} of three parts (`{DEPLOYMENTS[part]}`)"
    outcome = "they are Crashed, the run has the rest made by other parts, and completes"
    shown(Row(what, stage, outcome, LOST[stage], NOT_NEEDED))


def cancel_by_command(stack: Stack, run: str) -> None:
    stack.clone.run("prefect", "flow-run", "cancel", run)


def cancel_by_page(stack: Stack, run: str) -> None:
    """The request that Prefect's page sends."""
    stack.ask(f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})


CANCELS = {"`prefect flow-run cancel`": cancel_by_command, "cancel on Prefect's page": cancel_by_page}


@pytest.mark.parametrize("how", CANCELS, ids=["command", "page"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_is_cancelled(
    case: Callable[[str], Case], shown: Callable[[Row], None], stage: str, how: str
) -> None:
    made = case(stage)
    run = made.submit()
    made.wait_for_the_middle()
    CANCELS[how](made.stack, run)
    assert made.stack.ends(run)[0] == "CANCELLED"
    made.stack.quiet(made.runs)
    states = {other["state_type"] for other in made.stack.runs_in(made.runs)}
    assert states - {"COMPLETED"} == {"CANCELLED"}, "stages that ended before it are complete"
    wait_until(lambda: not made.stack.processes("dparallel.distillation"), lambda: "training goes on", 30)
    made.stack.upload(made.runs)
    statuses = made.stack.statuses(made.name)
    assert statuses.pop("distill") == ["KILLED"]
    # A stage of seconds may end before the worker sees the request.
    assert {status for of_stage in statuses.values() for status in of_stage} <= {"KILLED", "FINISHED"}
    made.same_again()
    outcome = "dispatched runs are cancelled too, their processes end, killed in MLflow"
    shown(Row(how, f"{stage} on a worker", outcome, LOST[stage]))


def test_two_runs_of_distill_at_once(case: Callable[[str], Case], shown: Callable[[Row], None]) -> None:
    made = case("trajectories")
    runs = [made.submit(on_pools=ON_POOLS) for _ in range(2)]
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
        assert "already done" in local.said
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
    options = ["--pool", "gpu", "--name", "bare", "--limit", "1"]
    with (tmp_path / "worker.log").open("wb") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "flows.worker", *options],
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
