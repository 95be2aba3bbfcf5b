"""Hostile candidates fail for the reason that the sandbox gives, and an honest one passes beside each."""

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from dparallel.problems.sandbox.jobs import Job, Limits, Mode, Outcome
from dparallel.problems.sandbox.run import run_all, run_tests
from tests.dparallel.problems.sandbox.attacks import FILLING, READING, VERDICT, WRITING, Attack
from tests.dparallel.problems.sandbox.hosts import BUBBLEWRAP, EITHER, missing

LIMITS = Limits(memory=256 << 20, disk=8 << 20, entries=300, threads=4)
HONEST = Job("def f(x): return 2 * x", "assert f(2) == 4", limits=LIMITS)
EVERY = {**VERDICT, **READING, **WRITING, **FILLING}
# Most of the attacks are on what both modes share.
IN_BOTH = [*READING, *WRITING, "memory", "memory in a file", "large files", "empty files"]
IN_BOTH.remove("killing its group")  # the first process of a namespace ignores signals from inside


@pytest.fixture(scope="module")
def facts() -> Iterator[dict[str, str]]:
    """What the attacks would like to reach: a port, a socket, paths of this machine."""
    name = f"sandbox-{uuid4().hex}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(f"\0{name}")
        unix.listen()
        home = Path.home()
        python = Path(os.path.realpath(sys.executable))
        seen = {path.relative_to(home).parts[0] for path in [python] if path.is_relative_to(home)}
        yield {
            "project": str(Path(__file__).parents[4] / "pyproject.toml"),
            "home": str(home),
            "parents": repr(seen or {"none"}),
            "home_note": "wrong at" if seen else "the candidate raised FileNotFoundError",
            "host": socket.gethostname(),
            "port": str(server.getsockname()[1]),
            "abstract": name,
            "clone": {"x86_64": "56", "aarch64": "220"}.get(os.uname().machine, "0"),
        }


def filled(text: str, facts: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: facts.get(found[1], found[0]), text)


def attacked(attack: Attack, mode: Mode, facts: dict[str, str]) -> Outcome:
    """The outcome of an attack, after that of an honest candidate at the same time."""
    job = Job(
        filled(attack.candidate, facts), filled(attack.tests, facts), limits=replace(LIMITS, wall=attack.wall)
    )
    hostile, honest = run_all([job, HONEST], mode, workers=2)
    assert honest.passed, honest
    return hostile


@BUBBLEWRAP
@pytest.mark.parametrize("name", EVERY)
def test_an_attack_fails(name: str, facts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "value")
    outcome = attacked(EVERY[name], "bubblewrap", facts)
    assert not outcome.passed
    assert re.match(filled(EVERY[name].note, facts), outcome.note), outcome


@pytest.mark.slow  # most of it is what both modes share
@pytest.mark.skipif(bool(missing("unshare")), reason=missing("unshare"))
@pytest.mark.parametrize("name", IN_BOTH)
def test_an_attack_fails_in_the_weaker_mode(
    name: str, facts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "value")
    outcome = attacked(EVERY[name], "unshare", facts)
    assert not outcome.passed
    note = filled(EVERY[name].note, facts)
    assert re.match(r"\[unshare: weaker sandbox\] " + note, outcome.note), outcome


THREADS = """
import threading
event = threading.Event()
def f(most):
    started = 0
    for _ in range(most):
        try: threading.Thread(target=event.wait, daemon=True).start()
        except RuntimeError: break
        started += 1
    return started
"""


@EITHER
def test_threads_are_limited(mode: Mode) -> None:
    """Many are tried only where the limit held for a few."""
    few = run_tests(Job(THREADS, "assert 1 <= f(12) < 12", limits=LIMITS), mode)
    if not few.passed:
        pytest.skip(f"the limit of {LIMITS.threads} threads does not hold here: {few.note}")
    many, honest = run_all([Job(THREADS, "assert f(200) < 12", limits=LIMITS), HONEST], mode, workers=2)
    assert many.passed, many
    assert honest.passed, honest


# A program that takes the candidate's place, in a session of its own if that is permitted, which can be seen
# from outside by its first argument.
LASTING = """
import os, sys
def f():
    try: os.setsid()
    except OSError: pass
    os.execv(sys.executable, ["MARK", "-S", "-c", "import time; time.sleep(60)"])
"""


def processes(mark: str) -> list[dict[str, str]]:
    """What the system says about processes of a name."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(mark.encode()):
                lines = (folder / "status").read_text(encoding="utf-8").splitlines()
                found.append(
                    {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
                )
        except OSError:  # it has ended
            continue
    return found


def wait_for_the_end(mark: str) -> None:
    until = time.monotonic() + 10
    while processes(mark):
        assert time.monotonic() < until, "a process outlives its sandbox"
        time.sleep(0.02)


@EITHER
def test_processes_have_no_rights_and_end_with_the_sandbox(mode: Mode) -> None:
    mark = f"sandboxed-{uuid4().hex}"
    job = Job(LASTING.replace("MARK", mark), "f()", limits=replace(LIMITS, wall=2))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_tests, job, mode)
        seen: list[dict[str, str]] = []
        while not seen and not running.done():
            seen = processes(mark)
            time.sleep(0.02)
        assert "no verdict after 2 s" in running.result().note
    wait_for_the_end(mark)
    assert len(seen) == 1
    status = seen[0]
    assert set(status["Uid"].split()) == {status["Uid"].split()[0]} != {"0"}
    assert set(status["Gid"].split()) == {status["Gid"].split()[0]} != {"0"}
    assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapAmb")} == {0}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


@EITHER
def test_a_sandbox_ends_with_the_process_that_made_it(mode: Mode) -> None:
    mark = f"sandboxed-{uuid4().hex}"
    judging = os.fork()
    if judging == 0:
        run_tests(Job(LASTING.replace("MARK", mark), "f()", limits=LIMITS), mode)
        os._exit(0)
    until = time.monotonic() + 30
    while not processes(mark) and time.monotonic() < until:
        time.sleep(0.02)
    started = len(processes(mark))
    os.kill(judging, signal.SIGKILL)
    os.waitpid(judging, 0)
    assert started == 1
    wait_for_the_end(mark)
