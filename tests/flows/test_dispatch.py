"""Dispatched runs, with a thread in place of the worker that finishes them."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import httpx
import pytest
from prefect import flow, get_client
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.deployments import run_deployment

from flows.dispatch import DispatchError, dispatch, dispatch_all

pytestmark = pytest.mark.usefixtures("prefect_server")


@flow(name="errand")
def errand(message: str, parent: str | None = None) -> None:
    raise AssertionError("the worker of these tests runs nothing")


@flow(name="parent")
def parent(message: str) -> None:
    dispatch("errand/stage", {f"errand {message}": {"message": message}}, poll_seconds=0.1)


@flow(name="dispatching")
def dispatching(name: str, parameters: dict[str, str]) -> None:
    dispatch("errand/stage", {name: parameters}, poll_seconds=0.1)


@flow(name="dispatching several")
def dispatching_several(messages: list[str]) -> list[str]:
    runs = {f"errand {message}": {"message": message} for message in messages}
    return [str(failure) for failure in dispatch_all("errand/stage", runs, poll_seconds=0.1)]


@flow(name="dispatching students")
def dispatching_students(students: list[str]) -> None:
    dispatch(
        "errand/stage",
        {f"training {student}": {"message": student} for student in students},
        poll_seconds=0.1,
    )


@pytest.fixture(scope="module", autouse=True)
def deployment(prefect_server: None) -> UUID:
    return errand.to_deployment(name="stage").apply()  # type: ignore[return-value]


def errands() -> list[FlowRun]:
    with get_client(sync_client=True) as client:
        return [run for run in client.read_flow_runs() if run.deployment_id and "message" in run.parameters]


def child_of(message: str) -> FlowRun:
    """The dispatched run that was given `message`."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for run in errands():
            if run.parameters["message"] == message:
                return run
        time.sleep(0.1)
    raise AssertionError("nothing was dispatched")


def end_child(message: str, state: State, after: threading.Thread | None = None) -> threading.Thread:
    def work() -> None:
        child = child_of(message)
        if after is not None:
            after.join()
            time.sleep(0.3)  # several polls of the parent
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(child.id, state, force=True)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.parametrize("ending", [StateType.FAILED, StateType.CRASHED, StateType.CANCELLED])
def test_what_becomes_of_the_child_becomes_of_the_parent(ending: StateType) -> None:
    worker = end_child(ending.value, State(type=ending, message="out of memory at train_step 7"))
    with pytest.raises(DispatchError, match="out of memory at train_step 7") as error:
        parent(ending.value)
    worker.join()
    assert f"run 'errand {ending.value}' of errand/stage" in str(error.value)
    assert ending.value.title() in str(error.value)


def test_a_child_that_completes_lets_the_parent_go_on() -> None:
    worker = end_child("well", State(type=StateType.COMPLETED))
    parent("well")
    worker.join()


@flow(name="dispatching again")
def dispatching_again(message: str, attempts: int) -> None:
    dispatch("errand/stage", {f"errand {message}": {"message": message}}, attempts, poll_seconds=0.1)


def ends_in_turn(message: str, *states: State) -> threading.Thread:
    """End the runs that are given `message`, one after the other."""

    def work() -> None:
        ended = set[UUID]()
        deadline = time.monotonic() + 60
        for state in states:
            new: list[FlowRun] = []
            while not new and time.monotonic() < deadline:
                time.sleep(0.05)
                new = [
                    run for run in errands() if run.parameters["message"] == message and run.id not in ended
                ]
            with get_client(sync_client=True) as client:
                client.set_flow_run_state(new[0].id, state, force=True)
            ended.add(new[0].id)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("states", "attempts", "ends"),
    [
        ([StateType.CRASHED, StateType.CRASHED, StateType.COMPLETED], 3, None),
        ([StateType.CRASHED, StateType.CRASHED], 2, "Crashed: a worker was lost"),
        ([StateType.CRASHED, StateType.FAILED], 3, "Failed: a worker was lost"),
        ([StateType.FAILED], 3, "Failed: a worker was lost"),
        ([StateType.CANCELLED], 3, "Cancelled: a worker was lost"),
    ],
)
def test_only_what_crashed_is_started_again(states: list[StateType], attempts: int, ends: str | None) -> None:
    message = f"again {states} {attempts}"
    worker = ends_in_turn(message, *(State(type=state, message="a worker was lost") for state in states))
    if ends is None:
        dispatching_again(message, attempts)
    else:
        with pytest.raises(DispatchError, match=ends):
            dispatching_again(message, attempts)
    worker.join()
    assert [run.parameters["message"] for run in errands()].count(message) == len(states)


@flow(name="dispatching for a while")
def dispatching_for_a_while(message: str, hours: float) -> None:
    runs = {f"errand {message}": {"message": message}}
    dispatch("errand/stage", runs, timeout_hours=hours, poll_seconds=0.1)


def test_a_run_that_takes_too_long_is_cancelled() -> None:
    def work() -> None:
        child = child_of("slow")
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(child.id, State(type=StateType.RUNNING), force=True)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                state = client.read_flow_run(child.id).state
                assert state is not None
                if state.type == StateType.CANCELLING:
                    break
                time.sleep(0.1)
            client.set_flow_run_state(child.id, State(type=StateType.CANCELLED), force=True)

    worker = threading.Thread(target=work)
    worker.start()
    with pytest.raises(DispatchError, match=r"it took longer than launch.timeout_hours=0.0003"):
        dispatching_for_a_while("slow", 0.0003)
    worker.join()


def test_one_of_several_that_crashes_does_not_end_the_others() -> None:
    crashes = end_child("first of two", State(type=StateType.CRASHED, message="exit code -9"))
    others = end_child("second of two", State(type=StateType.COMPLETED))
    failures = dispatching_several(["first of two", "second of two"])
    crashes.join()
    others.join()
    assert failures == ["run 'errand first of two' of errand/stage: Crashed: exit code -9"]


def test_all_that_failed_are_named_when_the_others_have_ended() -> None:
    """Students are trained side by side; they are named in their order, whichever ends first."""
    lost = end_child("is lost", State(type=StateType.CRASHED, message="no GPU"))
    fails = end_child("fails", State(type=StateType.FAILED, message="no GPU"), after=lost)
    well = end_child("goes well", State(type=StateType.COMPLETED))
    with pytest.raises(DispatchError) as error:
        dispatching_students(["fails", "is lost", "goes well"])
    for worker in (lost, fails, well):
        worker.join()
    assert str(error.value).splitlines() == [
        "run 'training fails' of errand/stage: Failed: no GPU",
        "run 'training is lost' of errand/stage: Crashed: no GPU",
    ]


def test_a_parent_that_is_interrupted_cancels_all_that_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flows.dispatch.time", SimpleNamespace(sleep=interrupt, monotonic=time.monotonic))
    with pytest.raises(KeyboardInterrupt):
        dispatching_several(["one part", "other part"])
    for message in ("one part", "other part"):
        state = child_of(message).state
        assert state is not None
        assert state.type in (StateType.CANCELLING, StateType.CANCELLED)


def test_a_parent_that_is_interrupted_cancels_its_child(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flows.dispatch.time", SimpleNamespace(sleep=interrupt, monotonic=time.monotonic))
    with pytest.raises(KeyboardInterrupt):
        parent("interrupted")
    monkeypatch.undo()
    state = child_of("interrupted").state
    assert state is not None
    assert state.type in (StateType.CANCELLING, StateType.CANCELLED)


def test_a_child_for_which_another_parent_waits_is_not_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    def pause(seconds: float) -> None:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        time.sleep(seconds)

    monkeypatch.setattr("flows.dispatch.time", SimpleNamespace(sleep=pause, monotonic=time.monotonic))
    first = threading.Thread(target=parent, args=["shared"])
    first.start()
    child_of("shared")
    with pytest.raises(KeyboardInterrupt):
        dispatching("errand", {"message": "shared"})
    state = child_of("shared").state
    end_child("shared", State(type=StateType.COMPLETED)).join()
    first.join()
    assert state is not None
    assert state.type not in (StateType.CANCELLING, StateType.CANCELLED)


def unreachable(*arguments: object, **keywords: object) -> None:
    raise httpx.ConnectError("connection refused")


def replace_in_client(monkeypatch: pytest.MonkeyPatch, method: str, instead: Callable) -> None:
    """For the dispatch only: the parent's own flow run is not affected."""

    @contextmanager
    def changed(**options: Any) -> Iterator[SimpleNamespace]:
        with get_client(**options) as client:
            names = ("read_flow_runs", "read_flow_run", "set_flow_run_state")
            yield SimpleNamespace(**{**{name: getattr(client, name) for name in names}, method: instead})

    monkeypatch.setattr("flows.dispatch.get_client", changed)


def test_a_run_that_cannot_be_cancelled_hides_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flows.dispatch.time", SimpleNamespace(sleep=interrupt, monotonic=time.monotonic))
    replace_in_client(monkeypatch, "set_flow_run_state", unreachable)
    with pytest.raises(KeyboardInterrupt):
        dispatching("errand", {"message": "not cancelled"})


def test_a_server_that_is_away_for_a_while_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter([True, True])

    def sometimes(run_id: UUID) -> FlowRun:
        if next(failures, False):
            unreachable()
        with get_client(sync_client=True) as client:
            return client.read_flow_run(run_id)

    replace_in_client(monkeypatch, "read_flow_run", sometimes)
    worker = end_child("patience", State(type=StateType.COMPLETED))
    parent("patience")
    worker.join()

    monkeypatch.setattr("flows.dispatch.PATIENCE_SECONDS", 0.0)
    replace_in_client(monkeypatch, "read_flow_run", unreachable)
    with pytest.raises(httpx.ConnectError):
        parent("no patience")


def test_a_run_that_goes_on_already_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parent was killed, so it was not cancelled; a different parent does not matter."""

    def end(message: str) -> None:
        for run in errands():
            if run.parameters["message"] == message:
                with get_client(sync_client=True) as client:
                    client.set_flow_run_state(run.id, State(type=StateType.COMPLETED), force=True)

    for message in ("joined", "other work"):
        parameters = {"message": message, "parent": "killed"}
        run_deployment("errand/stage", parameters=parameters, timeout=0, as_subflow=False)
    # A run ends during the wait.
    ending = SimpleNamespace(sleep=lambda seconds: end("joined"), monotonic=time.monotonic)
    monkeypatch.setattr("flows.dispatch.time", ending)
    for runs in (1, 2):  # a finished run is not joined
        dispatching("errand", {"message": "joined", "parent": "rerun"})
        assert [run.parameters["message"] for run in errands()].count("joined") == runs
