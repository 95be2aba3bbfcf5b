"""Work that several processes do at once: each item is done by one of them, and the others know it."""

import logging
import multiprocessing
import multiprocessing.synchronize
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dparallel.stages import files
from dparallel.stages.files import PARTIAL, making, sweep
from dparallel.stages.sharing import in_turn

FORK = multiprocessing.get_context("fork")  # saves importing everything again


def hold(path: Path, has_it: multiprocessing.synchronize.Event) -> None:
    with making(path) as mine:
        assert mine
        has_it.set()
        time.sleep(60)


@pytest.fixture
def holding(tmp_path: Path):
    """The id of another process, which is making `tmp_path / "0"`."""
    has_it = FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path / "0", has_it))
    process.start()
    assert has_it.wait(20)
    assert process.pid is not None
    yield process.pid
    process.kill()
    process.join()


def numbered(folder: Path, count: int) -> list[Path]:
    return [folder / str(number) for number in range(count)]


def turns(paths: list[Path]):
    return in_turn(paths, lambda path: path, lambda path: not path.exists(), "files", every=0.02)


def test_many_that_go_through_the_same_work_do_each_item_once(tmp_path: Path) -> None:
    paths, start = numbered(tmp_path, 12), threading.Barrier(6)

    def work(_: int) -> tuple[list[Path], list[Path]]:
        start.wait()
        done: dict[bool, list[Path]] = {True: [], False: []}
        with turns(paths) as found:
            for path, mine in found:
                if mine:
                    time.sleep(0.002)
                    path.write_bytes(b"made")
                done[mine].append(path)
        return done[True], done[False]

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(work, range(6)))
    assert sorted(path for made, _ in results for path in made) == sorted(paths), "none is done twice"
    for made, found in results:
        assert sorted(made + found) == sorted(paths), "each hears of every item once"
    assert sorted(tmp_path.iterdir()) == sorted(paths), "no claim is left"


def test_what_another_process_does_comes_last_and_is_taken_over_if_it_is_killed(
    tmp_path: Path, holding: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    order = []
    with turns(numbered(tmp_path, 3)) as found:
        for path, mine in found:
            assert mine
            order.append(path.name)
            path.write_bytes(b"made")
            if len(order) == 2:
                threading.Timer(0.2, os.kill, (holding, signal.SIGKILL)).start()
    assert order == ["1", "2", "0"]
    assert [record.message for record in caplog.records] == [
        "1 files are being made by other processes: waiting for them"
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]


def test_an_error_ends_the_claim(tmp_path: Path) -> None:
    def interrupted() -> None:
        with turns(numbered(tmp_path, 3)) as found:
            for _ in found:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as error:
        interrupted()
    assert error.traceback, "which keeps the loop alive"
    assert list(tmp_path.iterdir()) == []


def test_a_claim_is_swept_only_when_its_process_is_gone(tmp_path: Path, holding: int) -> None:
    (claim,) = tmp_path.glob(f".*{PARTIAL}")
    sweep(tmp_path)
    assert claim.exists()
    os.kill(holding, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while claim.exists():
        sweep(tmp_path)
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_without_locks_everyone_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_lock", lambda file: True)
    with making(tmp_path / "0") as mine, making(tmp_path / "0") as other:
        assert mine
        assert other
    assert list(tmp_path.iterdir()) == []
