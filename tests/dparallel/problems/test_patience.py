"""Limits count what a process has had of the machine, and not how busy the machine is."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from dparallel.problems import patience
from dparallel.problems.patience import MOST, Patience


@contextmanager
def python(code: str) -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-S", "-c", code], start_new_session=True)
    try:
        yield process.pid
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
        process.wait()


def watch(watched: Patience) -> str:
    while (state := watched.look()) == "going":
        time.sleep(max(watched.next - time.monotonic(), 0.0))
    return state


def test_a_process_that_sleeps_has_had_its_time() -> None:
    with python("import time; time.sleep(60)") as process:
        watched = Patience([process], 0.2)
        assert watch(watched) == "over"
        assert watched.counted == pytest.approx(0.2, abs=0.05)


def test_a_process_that_computes_has_had_its_time_when_it_has_computed_it() -> None:
    """Also on a busy machine, and in a process that it started."""
    child = "import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', 'while True: pass'])"
    with python(child) as process:
        time.sleep(0.3)
        watched = Patience([process], 0.3)
        assert watch(watched) == "over"
        assert 0.15 < watched.used < 0.45


class Machine:
    """A clock, and what a process ran and waited."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now, self.threads = 100.0, {1: (50.0, 70.0)}  # before it is watched
        monkeypatch.setattr(patience.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(patience, "_threads", lambda processes: self.threads.items())

    def goes_on(self, seconds: float, ran: float = 0.0, waited: float = 0.0, thread: int = 1) -> None:
        before: Any = self.threads.get(thread, (0.0, 0.0))
        self.threads[thread] = before[0] + ran, before[1] + waited
        self.now += seconds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_waiting_for_a_cpu_does_not_count(machine: Machine) -> None:
    watched = Patience([1], 3.0)
    for _ in range(11):
        machine.goes_on(1.0, ran=0.25, waited=0.75)
        assert watched.look() == "going"
    machine.goes_on(1.0, ran=0.25, waited=0.75)
    assert watched.look() == "over"
    assert (watched.used, watched.counted) == (3.0, 3.0)


def test_a_process_that_never_had_a_cpu_is_lost(machine: Machine) -> None:
    watched = Patience([1], 3.0)
    states = []
    for _ in range(3 * MOST):
        machine.goes_on(1.0, waited=1.0)
        states.append(watched.look())
    assert states == ["going"] * (3 * MOST - 1) + ["lost"]


def test_threads_that_take_the_cpus_from_each_other_have_had_their_time(machine: Machine) -> None:
    watched = Patience([1], 3.0)
    states = []
    for _ in range(3 * MOST):
        for thread in range(2, 6):
            machine.goes_on(0.25, ran=0.125, waited=0.25, thread=thread)
        states.append(watched.look())
    assert states == ["going"] * (3 * MOST - 1) + ["over"]


def test_the_time_in_which_this_process_was_stopped_does_not_count(machine: Machine) -> None:
    watched = Patience([1], 3.0)
    machine.goes_on(3600.0)
    assert watched.look() == "going"
    assert watched.counted == 2.0  # twice the time between two looks


def test_a_machine_that_counts_nothing_counts_all_time(machine: Machine) -> None:
    machine.threads.clear()
    watched = Patience([1], 2.0)
    machine.goes_on(1.0)
    assert watched.look() == "going"
    machine.goes_on(1.0)
    assert watched.look() == "over"
