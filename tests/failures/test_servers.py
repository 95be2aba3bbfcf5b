"""Runs on servers and workers: the servers are ended, come back, or stay away until the run is over."""

import signal
import time
from collections.abc import Callable

import pytest

from flows.dispatch import DEPLOYMENTS
from tests.failures.experiment import STAGES
from tests.failures.local import SIGNALS
from tests.failures.stack import NOT_NEEDED, Case
from tests.failures.table import Row


def all_is_in_mlflow(made: Case) -> set[str]:
    """Upload what waits; all runs are finished then. Returns their stages."""
    made.stack.upload(made.runs)
    statuses = made.stack.statuses(made.name)
    assert {status for of_stage in statuses.values() for status in of_stage} == {"FINISHED"}, statuses
    return set(statuses)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("stage", STAGES)
def test_both_servers_are_ended_and_come_back(
    case: Callable[[str], Case], shown: Callable[[Row], None], stage: str, number: signal.Signals
) -> None:
    made = case(stage)
    run = made.submit(DEPLOYMENTS[stage])
    made.wait_for_the_middle()
    for server in ("mlflow", "prefect"):
        made.stack.end(server, number)
    time.sleep(2)
    made.stack.up()
    assert made.stack.ends(run)[0] == "COMPLETED"
    made.is_undisturbed(stage)
    assert all_is_in_mlflow(made) == {stage}
    outcome = "the run goes on without them, and completes when they are back; so do MLflow's records"
    shown(
        Row(
            f"{SIGNALS[number]} of Prefect's and of MLflow's server",
            f"{stage} on a worker",
            outcome,
            rerun=NOT_NEEDED,
        )
    )


def test_mlflows_server_is_away_and_comes_back(
    case: Callable[[str], Case], shown: Callable[[Row], None]
) -> None:
    made = case("merging")
    made.stack.end("mlflow", signal.SIGKILL)
    run = made.submit()
    assert made.stack.ends(run)[0] == "COMPLETED"
    made.is_undisturbed()
    assert "did not accept the run" in made.stack.log("cpu-1", whole=True)
    made.stack.up()
    assert all_is_in_mlflow(made) == {"distill", *STAGES}
    outcome = "the run completes with warnings; `python -m tasks.tracking upload` uploads all of it"
    shown(Row("MLflow's server away", "merging, benchmark", outcome, rerun=NOT_NEEDED))
