"""One run at a time works on a stage of a store."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dparallel.stages import lease as locally
from dparallel.stages.manifest import StageError
from dparallel.stages.storage import lease
from dparallel.stages.storage.lease import Lease, held, newest
from dparallel.stages.storage.remote import Remote
from tests.dparallel.stages.storage.conftest import NewStorage

STAGE = "small/training-0123456789"
FAST = {"renewed_every": 0.02, "stale_after": 0.2}


@pytest.fixture
def remote(new_storage: NewStorage) -> Remote:
    return new_storage("here").remote


@pytest.fixture
def other_machine(monkeypatch: pytest.MonkeyPatch) -> locally.Holder:
    """A holder on another machine."""
    return locally.this_process().model_copy(update={"machine": "elsewhere", "host": "node-b", "pid": 7})


def silent(message: str) -> None:
    pass


def put(remote: Remote, number: int, found: Lease) -> None:
    remote.write(f"{STAGE}/leases/{number:06d}.json", found.model_dump_json().encode())


def test_one_at_a_time(remote: Remote) -> None:
    inside, most = 0, 0
    counting = threading.Lock()

    def work(_: int) -> None:
        nonlocal inside, most
        with held(remote, STAGE, silent, **FAST):
            with counting:
                inside += 1
                most = max(most, inside)
            time.sleep(0.01)
            with counting:
                inside -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert most == 1
    found = newest(remote, STAGE)
    assert found is not None
    assert found[1].released
    assert len(remote.sizes(f"{STAGE}/leases")) == 1, "older leases are removed"


def test_the_second_one_waits_and_says_for_whom(remote: Remote) -> None:
    said: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        with held(remote, STAGE, silent, **FAST):

            def second() -> None:
                with held(remote, STAGE, said.append, **FAST):
                    pass

            waiting = pool.submit(second)
            while not said:
                time.sleep(0.01)
        waiting.result(10)
    assert len(said) == 1
    assert f"{STAGE} is in use by process" in said[0]


def test_a_holder_that_ended_on_this_machine_is_taken_over_at_once(remote: Remote) -> None:
    gone = locally.this_process().model_copy(update={"identity": 1})
    put(remote, 3, Lease(holder=gone))
    began = time.monotonic()
    with held(remote, STAGE, silent) as check:
        check()
    assert time.monotonic() - began < 5


def test_a_lease_of_another_machine_is_taken_over_when_it_is_not_renewed(
    remote: Remote, other_machine: locally.Holder
) -> None:
    said: list[str] = []
    put(remote, 1, Lease(holder=other_machine))
    began = time.monotonic()
    with held(remote, STAGE, said.append, **FAST):
        assert time.monotonic() - began > FAST["stale_after"]
        found = newest(remote, STAGE)
        assert found is not None
        assert found[0] == 2
    assert "process 7 on node-b" in said[0]


def test_a_lease_that_is_renewed_is_not_taken_over(remote: Remote, other_machine: locally.Holder) -> None:
    ended = threading.Event()

    def renew() -> None:
        for count in range(20):
            put(remote, 1, Lease(holder=other_machine, count=count))
            time.sleep(0.03)
        ended.set()
        put(remote, 1, Lease(holder=other_machine, released=True))

    put(remote, 1, Lease(holder=other_machine))
    renewing = threading.Thread(target=renew)
    renewing.start()
    with held(remote, STAGE, silent, **FAST):
        assert ended.is_set()
    renewing.join()


def test_a_run_whose_lease_was_taken_over_stops(remote: Remote, other_machine: locally.Holder) -> None:
    with held(remote, STAGE, silent, **FAST) as check:
        check()
        put(remote, 2, Lease(holder=other_machine))
        with pytest.raises(StageError, match="was taken over by process 7 on node-b"):
            check()
    found = newest(remote, STAGE)
    assert found == (2, Lease(holder=other_machine)), "which is not touched"


def test_a_damaged_lease_becomes_stale(remote: Remote) -> None:
    remote.write(f"{STAGE}/leases/000001.json", b"{")
    with held(remote, STAGE, silent, **FAST) as check:
        check()


def test_exactly_one_of_several_takes_over(remote: Remote) -> None:
    put(remote, 1, Lease(released=True))
    numbers = []
    with ThreadPoolExecutor(4) as pool:
        mine = [Lease(holder=locally.this_process()) for _ in range(4)]
        watch = lease.Watch(remote, STAGE)
        watch.holder()
        numbers = list(pool.map(lambda one: remote.create(lease._name(STAGE, 2), lease._content(one)), mine))
    assert sorted(numbers) == [False, False, False, True]
