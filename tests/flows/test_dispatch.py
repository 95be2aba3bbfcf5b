"""Dispatched runs, with a thread in the place of the worker that ends them."""

import threading
import time
from types import SimpleNamespace
from uuid import UUID

import pytest
from prefect import flow, get_client
from prefect.client.schemas.objects import FlowRun, State, StateType

from flows.dispatch import DispatchError, dispatch

pytestmark = pytest.mark.usefixtures("prefect_server")


@flow(name="errand")
def errand(message: str) -> None:
    raise AssertionError("the worker of these tests runs nothing")


@flow(name="parent")
def parent(message: str) -> None:
    dispatch("errand/stage", f"errand {message}", {"message": message}, poll_seconds=0.1)


@pytest.fixture(scope="module", autouse=True)
def deployment(prefect_server: None) -> UUID:
    return errand.to_deployment(name="stage").apply()  # type: ignore[return-value]


def child_of(message: str) -> FlowRun:
    """The dispatched run that was given `message`."""
    deadline = time.monotonic() + 60
    with get_client(sync_client=True) as client:
        while time.monotonic() < deadline:
            for run in client.read_flow_runs():
                if run.parameters == {"message": message} and run.deployment_id is not None:
                    return run
            time.sleep(0.1)
    raise AssertionError("nothing was dispatched")


def end_child(message: str, state: State) -> threading.Thread:
    def work() -> None:
        child = child_of(message)
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


def test_a_parent_that_is_interrupted_cancels_its_child(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flows.dispatch.time", SimpleNamespace(sleep=interrupt))
    with pytest.raises(KeyboardInterrupt):
        parent("interrupted")
    monkeypatch.undo()
    state = child_of("interrupted").state
    assert state is not None
    assert state.type in (StateType.CANCELLING, StateType.CANCELLED)
