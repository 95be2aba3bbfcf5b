"""A stage's flow as a deployment run on its work pool; its failure is the caller's."""

import time
from typing import Any, cast
from uuid import UUID

from prefect import get_client, get_run_logger
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.states import Cancelling

POLL_SECONDS = 3.0


class DispatchError(RuntimeError):
    """A dispatched run did not complete; the message names the run, its state and its own message."""


def dispatch(
    deployment: str, name: str, parameters: dict[str, Any], poll_seconds: float = POLL_SECONDS
) -> None:
    """Run `flow/deployment`, as `name`, where a worker picks it up, and wait for its end.

    If this wait is interrupted (cancelled, killed by a signal), the run is cancelled too.

    Raises:
        DispatchError: the run failed, crashed or was cancelled.
    """
    # A time-out of 0 returns the run at once; waiting here lets us show its states and cancel it.
    run = run_deployment(deployment, parameters=parameters, flow_run_name=name, timeout=0)
    run_id = cast(FlowRun, run).id
    try:
        state = _wait(run_id, name, poll_seconds)
    except BaseException:
        _cancel(run_id)
        raise
    if not state.is_completed():
        raise DispatchError(f"run {name!r} of {deployment}: {state.name}: {state.message or 'no message'}")


def _wait(run_id: UUID, name: str, poll_seconds: float) -> State:
    log = get_run_logger()
    seen = None
    with get_client(sync_client=True) as client:
        while True:
            state = client.read_flow_run(run_id).state
            if state is not None and state.name != seen:
                seen = state.name
                log.info("dispatched run %r: %s", name, seen)
                if seen == "Late":
                    log.warning("no worker has picked up run %r yet; is one started for its pool?", name)
            if state is not None and state.is_final():
                return state
            time.sleep(poll_seconds)


def _cancel(run_id: UUID) -> None:
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run_id, Cancelling(message="the run that waited for it ended"))
