"""What a worker says of its flow runs when it is stopped; tests/failures/test_workers.py stops real ones."""

from typing import Any

import anyio
import pytest
from prefect import flow, get_client
from prefect.client.schemas.objects import State, StateType
from prefect.workers.base import BaseWorker
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker

from flows.worker import MESSAGE, Worker


@flow
def nothing() -> None: ...


@pytest.mark.parametrize(
    ("begun", "ended"),
    [
        (StateType.RUNNING, StateType.CRASHED),
        (StateType.PENDING, StateType.CRASHED),
        (StateType.CANCELLING, StateType.CANCELLING),  # whoever cancels it says how it ends
        (StateType.COMPLETED, StateType.COMPLETED),
    ],
    ids=lambda state: state.name,
)
def test_a_run_of_a_stopped_worker_is_crashed(
    prefect_server: None, monkeypatch: pytest.MonkeyPatch, begun: StateType, ended: StateType
) -> None:
    async def run_for_ever(self: ProcessWorker, *arguments: Any) -> None:
        await anyio.sleep_forever()

    monkeypatch.setattr(ProcessWorker, "run", run_for_ever)

    async def stop() -> State | None:
        async with get_client() as client, Worker("a pool of its own") as worker:
            run = await client.create_flow_run(nothing, state=State(type=begun))
            with anyio.move_on_after(0.1):
                await worker.run(run, ProcessJobConfiguration())
            return (await client.read_flow_run(run.id)).state

    state = anyio.run(stop)
    assert state is not None
    assert state.type == ended
    assert state.message == (MESSAGE if ended == StateType.CRASHED else None)


def test_it_is_the_worker_of_process_pools() -> None:
    assert BaseWorker.get_worker_class_from_type("process") is Worker
