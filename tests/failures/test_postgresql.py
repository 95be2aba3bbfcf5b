"""A round with PostgreSQL behind both servers: the worker and Prefect's server are killed."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.local.processes import Processes, stop
from tests.deploy.test_servers import postgres
from tests.failures.experiment import copy_before, results, temporary_files
from tests.failures.local import SECONDS, wait_until
from tests.failures.stack import Stack
from tests.failures.table import Row
from tests.failures.test_signals import LOST, is_in_the_middle

__all__ = ["postgres"]


@pytest.fixture
def stack(tmp_path: Path, postgres: str, tiny_checkpoint: Path) -> Iterator[Stack]:
    (tmp_path / "clone").mkdir()
    made = Stack(
        tmp_path / "clone",
        tiny_checkpoint,
        DPARALLEL_PREFECT_DATABASE=f"postgresql+asyncpg://{postgres}/prefect",
        DPARALLEL_MLFLOW_STORE=f"postgresql://{postgres}/mlflow",
    )
    try:
        made.up()
        yield made
        made.down()
    finally:
        stop(Processes(made.clone.folder / ".dparallel").records().values(), seconds=0)


def test_a_round_on_postgresql(
    stack: Stack,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shown: Callable[[Row], None],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stack.mlflow)
    runs, undisturbed = tmp_path / "runs", results(reference / "runs")
    copy_before(reference / "runs", runs, "training")
    config = stack.config(runs)

    def wait_for_the_middle() -> None:
        wait_until(lambda: is_in_the_middle(runs, "training"), lambda: stack.log("gpu-1"), 2 * SECONDS)

    run = stack.submit("distill/full", config)
    wait_for_the_middle()
    os.kill(stack.clone.pids()["gpu-1"], signal.SIGKILL)
    wait_until(lambda: not stack.processes("dparallel.distillation"), lambda: "training goes on")
    stack.up()
    wait_until(
        lambda: bool(stack.processes("dparallel.distillation")), lambda: stack.log("gpu-1"), 2 * SECONDS
    )
    os.kill(stack.clone.pids()["prefect"], signal.SIGKILL)
    time.sleep(5)
    stack.up()
    assert stack.ends(run)[0] == "COMPLETED"
    found = results(runs)
    assert found == {name: undisturbed[name] for name in found}
    assert temporary_files(runs) == []
    stack.upload(runs)
    statuses = stack.statuses("small")
    assert statuses["distill"][-1] == statuses["training"][-1] == "FINISHED"
    assert "RUNNING" not in {status for of_stage in statuses.values() for status in of_stage}
    outcome = "as on SQLite: the training is started again, and the run completes"
    what = "PostgreSQL behind both servers: SIGKILL of the gpu worker, then of Prefect's server"
    shown(Row(what, "training on a worker", outcome, LOST["training"], "not needed"))
