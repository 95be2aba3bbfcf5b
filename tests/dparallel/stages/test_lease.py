"""One run at a time works in a folder; a lease is taken over only if its holder is gone."""

import json
import logging
import multiprocessing
import multiprocessing.synchronize
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from dparallel.stages import lease
from dparallel.stages.lease import LEASE, Holder, LeaseHeldError, Watch, held, this_process, wait_until_free
from dparallel.stages.manifest import StageError

QUICK = {"renewed_every": 0.05, "stale_after": 0.4}
FORK = multiprocessing.get_context("fork")  # saves importing everything again


def hold(folder: Path, has_it: multiprocessing.synchronize.Event) -> None:
    with held(folder):
        has_it.set()
        time.sleep(60)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "stage.json").write_text("{}", encoding="utf-8")
    return tmp_path


@pytest.fixture
def holding(folder: Path):
    """The id of another process, which holds the lease."""
    has_it = FORK.Event()
    process = FORK.Process(target=hold, args=(folder, has_it))
    process.start()
    assert has_it.wait(20)
    assert process.pid is not None
    yield process.pid
    process.kill()
    process.join()


def lease_of(folder: Path) -> Holder:
    return Holder.model_validate_json((folder / LEASE).read_bytes())


def write(folder: Path, **changes) -> None:
    """The lease of another run."""
    (folder / LEASE).write_text(
        lease.this_process().model_copy(update=changes).model_dump_json(), encoding="utf-8"
    )


def test_a_second_run_is_refused_by_name_until_the_first_has_ended(folder: Path) -> None:
    with held(folder) as check:
        check()
        me = lease_of(folder)
        assert me.pid == os.getpid()
        with pytest.raises(LeaseHeldError, match=f"in use by process {me.pid} on {me.host} since 20"):
            held(folder).__enter__()
        check()
        assert (datetime.now().astimezone() - datetime.fromisoformat(me.since)).total_seconds() < 60
    assert [file.name for file in folder.iterdir()] == ["stage.json"]
    with pytest.raises(ZeroDivisionError), held(folder):
        raise ZeroDivisionError
    with held(folder):
        pass


def test_the_lease_of_a_killed_process_is_taken_over(folder: Path, holding: int, caplog) -> None:
    with pytest.raises(LeaseHeldError, match=f"process {holding} on"):
        held(folder).__enter__()
    os.kill(holding, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while psutil.Process(holding).status() != psutil.STATUS_ZOMBIE:  # ended, but not yet waited for
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with caplog.at_level(logging.WARNING), held(folder):
        assert lease_of(folder).pid == os.getpid()
    assert f"was in use by process {holding} on" in caplog.text


def test_a_stopped_process_keeps_its_lease(folder: Path, holding: int) -> None:
    os.kill(holding, signal.SIGSTOP)
    os.utime(folder / LEASE, (0, 0))
    with pytest.raises(LeaseHeldError):
        held(folder, **QUICK).__enter__()


def test_another_process_of_the_same_number_is_not_the_holder(folder: Path) -> None:
    write(folder, identity=hash(psutil.Process()) + 1)
    with held(folder):
        assert lease_of(folder).identity == hash(psutil.Process())


def test_a_live_run_on_another_machine_is_left_alone_whatever_its_clock(folder: Path) -> None:
    """Its file's time is years off, and changes: it is being renewed."""
    write(folder, machine="elsewhere", host="elsewhere", token="other")
    ended = threading.Event()

    def renew() -> None:
        for second in range(1_000_000):
            os.utime(folder / LEASE, (second, second))
            if ended.wait(0.05):
                return

    renewal = threading.Thread(target=renew)
    renewal.start()
    try:
        watch = lease.Watch(folder, stale_after=0.4)
        until = time.monotonic() + 1.2
        while time.monotonic() < until:
            assert watch.holder() is not None
            time.sleep(0.02)
    finally:
        ended.set()
        renewal.join()


def test_a_run_on_another_machine_that_gives_no_sign_is_replaced(folder: Path, caplog) -> None:
    write(folder, machine="elsewhere", host="elsewhere", token="other")
    with pytest.raises(LeaseHeldError, match="on elsewhere"):
        held(folder, **QUICK).__enter__()  # renewed recently
    os.utime(folder / LEASE, (0, 0))
    began = time.monotonic()
    with held(folder, **QUICK):
        assert 0.4 <= time.monotonic() - began < 5
        assert lease_of(folder).machine == lease.this_machine()


@pytest.mark.parametrize("pid", [-1, 2**70, "one"])
def test_a_lease_with_an_impossible_process_is_readable(folder: Path, pid: object) -> None:
    content = {**this_process().model_dump(), "pid": pid}
    (folder / LEASE).write_text(json.dumps(content), encoding="utf-8")
    assert Watch(folder).holder() in (None, Holder())


def test_a_damaged_lease_is_replaced_once_nothing_renews_it(folder: Path) -> None:
    (folder / LEASE).write_text("", encoding="utf-8")
    with pytest.raises(LeaseHeldError, match="an unknown machine"):
        held(folder, **QUICK).__enter__()
    os.utime(folder / LEASE, (0, 0))
    with held(folder, **QUICK):
        pass


def test_a_lease_is_renewed_and_its_loss_is_noticed(folder: Path) -> None:
    with held(folder, **QUICK) as check:
        os.utime(folder / LEASE, (0, 0))
        deadline = time.monotonic() + 5
        while (folder / LEASE).stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        check()
        write(folder, token="another", pid=77)
        with pytest.raises(StageError, match="was taken over by process 77"):
            check()
    assert lease_of(folder).token == "another"  # must not be removed by us


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_that_start_at_once_one_holds_at_a_time(folder: Path, stale: bool) -> None:
    if stale:
        write(folder, pid=2**22 + 1)
    inside, most, refused = 0, 0, 0
    lock = threading.Lock()
    start = threading.Barrier(8)

    def run(_: int) -> None:
        nonlocal inside, most, refused
        start.wait()
        for _ in range(15):
            try:
                with held(folder, renewed_every=5):
                    with lock:
                        inside += 1
                        most = max(most, inside)
                    time.sleep(0.001)
                    with lock:
                        inside -= 1
            except LeaseHeldError:
                with lock:
                    refused += 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, range(8)))
    assert most == 1
    assert refused < 8 * 15
    assert [file.name for file in folder.iterdir()] == ["stage.json"]


def test_waiting_ends_with_the_holder_and_says_for_whom(folder: Path, holding: int) -> None:
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        os.kill(holding, signal.SIGKILL)

    wait_until_free(folder, say, every=0.02)
    assert said == [f"{folder} is in use by {lease_of(folder)}: waiting for its result"]
    (folder / LEASE).unlink()
    wait_until_free(folder, say)
    assert len(said) == 1


def test_stopped_processes_leave_no_lease_and_running_ones_keep_theirs(tmp_path: Path) -> None:
    with held(tmp_path):
        lease.remove_left(tmp_path)
        assert (tmp_path / LEASE).is_file()
        gone = Holder.model_validate_json((tmp_path / LEASE).read_bytes()).model_copy(update={"identity": 1})
    lease.remove_left(tmp_path)
    (tmp_path / LEASE).write_text(gone.model_dump_json(), encoding="utf-8")
    lease.remove_left(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_who_takes_the_lease_sweeps_and_nobody_else(tmp_path: Path) -> None:
    saving = tmp_path / ".saving-x"
    saving.mkdir()
    (saving / "model.safetensors").write_bytes(b"half")
    with held(tmp_path):
        assert not saving.exists()
        saving.mkdir()
        with pytest.raises(LeaseHeldError), held(tmp_path):
            pass
        assert saving.exists()


@pytest.mark.skipif(not psutil.LINUX, reason="where /proc/stat has the time of the boot")
def test_a_clock_that_is_set_takes_no_lease_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = psutil.Process().create_time()
    with held(folder):
        boot = psutil._pslinux.boot_time()
        monkeypatch.setattr("psutil._pslinux.boot_time", lambda: boot - 3600)
        assert psutil.Process().create_time() == pytest.approx(before - 3600, abs=2)
        with pytest.raises(LeaseHeldError):
            held(folder, **QUICK).__enter__()
