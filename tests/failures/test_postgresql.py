"""A round with PostgreSQL behind both servers: the worker and Prefect's server are killed."""

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.deploy.test_servers import postgres
from tests.failures.experiment import LOST
from tests.failures.local import SECONDS, wait_until
from tests.failures.stack import NOT_NEEDED, TRAINING, Case, Stack, running_stack
from tests.failures.table import Row

__all__ = ["postgres"]


@pytest.fixture
def stack(
    tmp_path_factory: pytest.TempPathFactory, postgres: str, tiny_checkpoint: Path, reference: Path
) -> Iterator[Stack]:
    databases = {
        "DPARALLEL_PREFECT_DATABASE": f"postgresql+asyncpg://{postgres}/prefect",
        "DPARALLEL_MLFLOW_STORE": f"postgresql://{postgres}/mlflow",
    }
    with running_stack(tmp_path_factory.mktemp("clone"), tiny_checkpoint, **databases) as made:
        yield made


def test_a_round_on_postgresql(case: Callable[[str], Case], shown: Callable[[Row], None]) -> None:
    made = case("training")
    run = made.submit()
    made.wait_for_the_middle()
    made.stack.end("gpu-1", signal.SIGKILL)
    wait_until(lambda: not made.stack.processes("dparallel.distillation"), lambda: "training goes on")
    made.stack.up()
    wait_until(
        lambda: bool(made.stack.processes("dparallel.distillation")),
        lambda: made.stack.log("gpu-1"),
        2 * SECONDS,
    )
    made.stack.end("prefect", signal.SIGKILL)
    time.sleep(5)
    made.stack.up()
    assert made.stack.ends(run)[0] == "COMPLETED"
    made.is_undisturbed()
    made.stack.upload(made.runs)
    statuses = made.stack.statuses(made.name)
    assert statuses["distill"][-1] == statuses["training"][-1] == "FINISHED"
    assert "RUNNING" not in {status for of_stage in statuses.values() for status in of_stage}
    outcome = "as on SQLite: the training is started again, and the run completes"
    what = "PostgreSQL behind both servers: SIGKILL of the gpu worker, then of Prefect's server"
    shown(Row(what, TRAINING, outcome, LOST["training"], NOT_NEEDED))
