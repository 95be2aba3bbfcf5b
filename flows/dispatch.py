"""A stage's flow as a deployment run on its work pool; its failure is the caller's."""

import time
from typing import Any, cast
from uuid import UUID

import httpx
from prefect import get_client, get_run_logger
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.deployments import run_deployment
from prefect.states import Cancelling

POLL_SECONDS = 3.0
PATIENCE_SECONDS = 300.0  # how long the server may be away while a run is waited for


class DispatchError(RuntimeError):
    """A dispatched run did not complete; the message names the run, its state and its own message."""


def dispatch(
    deployment: str, name: str, parameters: dict[str, Any], poll_seconds: float = POLL_SECONDS
) -> None:
    """Run `flow/deployment`, as `name`, where a worker picks it up, and wait for its end.

    A run of it with the same parameters (but `parent`) that still goes on, say of a caller that was
    killed, is joined: two would write the same folder. If this wait is interrupted (cancelled, killed
    by a signal), the run is cancelled too.

    Raises:
        DispatchError: the run failed, crashed or was cancelled.
    """
    run = _going_on(deployment, parameters)
    if run is None:
        # A time-out of 0 returns the run at once; waiting here lets us show its states and cancel it.
        run = cast(FlowRun, run_deployment(deployment, parameters=parameters, flow_run_name=name, timeout=0))
    else:
        get_run_logger().warning(
            "joined run %r of %s, which goes on already; if nobody works on it any more: "
            "prefect flow-run cancel %s",
            run.name,
            deployment,
            run.id,
        )
    try:
        state = _wait(run.id, name, poll_seconds)
    except BaseException:
        _cancel(run.id)
        raise
    if not state.is_completed():
        raise DispatchError(f"run {name!r} of {deployment}: {state.name}: {state.message or 'no message'}")


def _going_on(deployment: str, parameters: dict[str, Any]) -> FlowRun | None:
    """A run of the deployment for the same work that has not ended."""
    flow, _, name = deployment.partition("/")
    states = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING]
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[flow])),
            deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=[name])),
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states))),
        )
    work = {key: value for key, value in parameters.items() if key != "parent"}
    same = (run for run in runs if work.items() <= run.parameters.items())
    return next(same, None)


def _wait(run_id: UUID, name: str, poll_seconds: float) -> State:
    log = get_run_logger()
    seen = None
    answered = time.monotonic()
    with get_client(sync_client=True) as client:
        while True:
            try:
                state = client.read_flow_run(run_id).state
                answered = time.monotonic()
            except httpx.HTTPError as error:
                if time.monotonic() - answered > PATIENCE_SECONDS:
                    raise
                log.warning("no word of run %r (%s); asking again", name, error)
                state = None
            if state is not None and state.name != seen:
                seen = state.name
                log.info("dispatched run %r: %s", name, seen)
                if seen == "Late":
                    log.warning("no worker has picked up run %r yet; is one started for its pool?", name)
            if state is not None and state.is_final():
                return state
            time.sleep(poll_seconds)


def _cancel(run_id: UUID) -> None:
    try:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(run_id, Cancelling(message="the run that waited for it ended"))
    except Exception as error:  # what ended the wait matters more
        get_run_logger().warning("not cancelled (%s); do it by: prefect flow-run cancel %s", error, run_id)
