"""Run flows as deployments on their work pools, wait for them, and report failures to the caller."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from uuid import UUID

import httpx
from prefect import get_client, get_run_logger, runtime
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.deployments import run_deployment
from prefect.states import Cancelling

from dparallel.stages.experiment import Experiment
from flows.names import experiment_of, title_of
from tasks.labels import tag_run

CALLER = "caller:"  # tag of a dispatched run: a flow run that waits for it
POLL_SECONDS = 3.0
PATIENCE_SECONDS = 300.0  # how long the server may be unreachable while waiting for a run


DEPLOYMENTS = {  # by flow, as in prefect.yaml
    "trajectories": "trajectories/record",
    "shards": "shards/record-part",
    "training": "training/train",
    "merging": "merging/merge",
    "benchmark": "benchmark/measure",
    "measurements": "measurements/measure-part",
}
Workers = Callable[[Sequence[Any]], list[str]]  # has work done, and returns a message for each failure


@dataclass(frozen=True)
class Failure:
    """A dispatched run that did not complete."""

    name: str
    deployment: str
    state: StateType
    text: str  # name and message of the state

    def __str__(self) -> str:
        return f"run {self.name!r} of {self.deployment}: {self.text}"


class DispatchError(RuntimeError):
    """A dispatched run did not complete; the message names the run, its state and its message."""


def dispatch(
    deployment: str,
    runs: Mapping[str, dict[str, Any]],
    attempts: int = 1,
    timeout_hours: float | None = None,
    poll_seconds: float = POLL_SECONDS,
) -> None:
    """Start a run of `flow/deployment` for each of `runs` (parameters by name), and wait for all of them.

    They run side by side, as many at a time as their work pool has room for; see `dispatch_all`.

    Args:
        attempts: how often a run is started while it crashes, which happens if its worker is lost. It then
            goes on where the crashed one was. A run that fails is not started again.
        timeout_hours: a run that takes longer, from its start on a worker, is cancelled.

    Raises:
        DispatchError: some failed, crashed or were cancelled; the others have ended too. The message names
            all that did not complete.
    """
    rest, failures = dict(runs), list[Failure]()
    for left in range(attempts - 1, -1, -1):
        ended = dispatch_all(deployment, rest, poll_seconds, timeout_hours)
        crashed = [failure for failure in ended if failure.state == StateType.CRASHED and left]
        failures += [failure for failure in ended if failure not in crashed]
        for failure in crashed:
            get_run_logger().warning("%s; it is started again", failure)
        rest = {failure.name: runs[failure.name] for failure in crashed}
        if not rest:
            break
    if failures:
        raise DispatchError("\n".join(map(str, in_order_of(runs, failures))))


def in_order_of(runs: Iterable[str], failures: Iterable[Failure]) -> list[Failure]:
    """Failures in the order in which their runs were asked for, whichever ended first."""
    places = {name: place for place, name in enumerate(runs)}
    return sorted(failures, key=lambda failure: places[failure.name])


def workers(flow: str, key: str, experiment: Experiment, **choice: str) -> Workers:
    """The function that has work done by `launch.parts` runs of a flow's deployment; see `deal`."""

    def have_done(work: Sequence[Any]) -> list[str]:
        settings = {"config": experiment.as_parameter(), **choice}
        return deal(flow, key, experiment.config.launch.parts, settings, work)

    return have_done


def deal(flow: str, key: str, parts: int, parameters: dict[str, Any], work: Sequence[Any]) -> list[str]:
    """Divide `work` into at most `parts` runs of a flow's deployment, and wait for them.

    Args:
        key: name of the parameter for a run's share of `work`.
        parameters: further parameters, equal for all runs.

    Returns:
        A message for each run that failed, crashed or was cancelled.
    """
    count, name = min(parts, len(work)), title_of(flow, parameters)
    runs = {
        f"{name}, part {part + 1} of {count}": {**parameters, key: list(work[part::count])}
        for part in range(count)
    }
    return [str(failure) for failure in dispatch_all(DEPLOYMENTS[flow], runs)]


def dispatch_all(
    deployment: str,
    runs: Mapping[str, dict[str, Any]],
    poll_seconds: float = POLL_SECONDS,
    timeout_hours: float | None = None,
) -> list[Failure]:
    """Start a run of `flow/deployment` for each of `runs` (parameters by name), and wait for all of them.

    If a run with the same parameters (except `parent`) is still in progress, for example because its caller
    was killed, it is joined instead of starting a second one. If waiting is interrupted (cancelled, or ended
    by a signal), the runs are cancelled as well, except those for which another caller waits. A failed run
    does not stop the others.

    Returns:
        The runs that failed, crashed or were cancelled.
    """
    going: dict[UUID, str] = {}
    try:
        for name, parameters in runs.items():
            going[_start_or_join(deployment, name, parameters)] = name
        return in_order_of(runs, _wait(deployment, going, poll_seconds, timeout_hours))
    except BaseException:
        for run_id in going:
            if not _others_wait(run_id):
                _cancel(run_id)
        raise


def _start_or_join(deployment: str, name: str, parameters: dict[str, Any]) -> UUID:
    run, caller = _going_on(deployment, parameters), f"{CALLER}{runtime.flow_run.id}"
    if run is None:
        kinds = {"experiment": experiment_of(parameters), **parameters}
        tags = [f"{kind}:{kinds[kind]}" for kind in ("experiment", "student", "benchmark") if kinds.get(kind)]
        tags.append(caller)
        # A timeout of 0 returns immediately; `_wait` shows the states of the run and can cancel it.
        started = run_deployment(deployment, parameters=parameters, flow_run_name=name, tags=tags, timeout=0)
        run = cast(FlowRun, started)
    else:
        tag_run([caller], run.id)
        get_run_logger().warning(
            "joined run %r of %s, which is already in progress; if it is stuck: prefect flow-run cancel %s",
            run.name,
            deployment,
            run.id,
        )
    return run.id


def _going_on(deployment: str, parameters: dict[str, Any]) -> FlowRun | None:
    """An unfinished run of the deployment with the same parameters."""
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


def _wait(
    deployment: str, going: dict[UUID, str], poll_seconds: float, timeout_hours: float | None
) -> list[Failure]:
    """Wait until all runs in `going` have ended, removing them; returns those that did not complete."""
    log = get_run_logger()
    seen: dict[UUID, str | None] = {}
    late = set[UUID]()  # cancelled because they took too long
    failures = []
    answered = time.monotonic()
    with get_client(sync_client=True) as client:
        while True:
            for run_id, name in list(going.items()):
                try:
                    run = client.read_flow_run(run_id)
                    answered = time.monotonic()
                except httpx.HTTPError as error:
                    if time.monotonic() - answered > PATIENCE_SECONDS:
                        raise
                    log.warning("the state of run %r is unknown (%s); asking again", name, error)
                    continue
                state = run.state
                if state is not None and state.name != seen.get(run_id):
                    seen[run_id] = state.name
                    log.info("dispatched run %r: %s", name, state.name)
                    if set(seen.values()) <= {"Scheduled", "Late"} and state.name == "Late":
                        log.warning("no worker has picked up run %r yet; is one started for its pool?", name)
                if state is not None and state.is_final():
                    del going[run_id]
                    if not state.is_completed():
                        text = f"{state.name}: {state.message or 'no message'}"
                        if run_id in late:
                            text += f"; it took longer than launch.timeout_hours={timeout_hours:g}"
                        failures.append(Failure(name, deployment, state.type, text))
                elif run_id not in late and _takes_too_long(run, timeout_hours):
                    late.add(run_id)
                    _cancel(run_id, f"it took longer than launch.timeout_hours={timeout_hours:g}")
            if not going:
                return failures
            time.sleep(poll_seconds)


def _takes_too_long(run: FlowRun, timeout_hours: float | None) -> bool:
    if timeout_hours is None:
        return False
    return bool(run.estimated_run_time.total_seconds() > timeout_hours * 3600)


def _others_wait(run_id: UUID) -> bool:
    """Whether another flow run in progress waits for a dispatched run; False if that cannot be told."""
    try:
        with get_client(sync_client=True) as client:
            tags = client.read_flow_run(run_id).tags
            callers = {tag.removeprefix(CALLER) for tag in tags if tag.startswith(CALLER)}
            for caller in callers - {str(runtime.flow_run.id)}:
                other = client.read_flow_run(UUID(caller))
                if other.state is not None and other.state.type == StateType.RUNNING:
                    get_run_logger().warning("run %s goes on: %r waits for it, too", run_id, other.name)
                    return True
    except Exception as error:  # the error that ended the wait is more important
        get_run_logger().debug("callers of run %s are unknown: %s", run_id, error)
    return False


def _cancel(run_id: UUID, why: str = "the run that waited for it ended") -> None:
    try:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(run_id, Cancelling(message=why))
    except Exception as error:  # the error that ended the wait is more important
        get_run_logger().warning("not cancelled (%s); do it by: prefect flow-run cancel %s", error, run_id)
