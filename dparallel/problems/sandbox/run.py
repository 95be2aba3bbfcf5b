"""Run candidates against their tests: two confined processes for each, joined by pipes."""

import contextlib
import functools
import math
import os
import secrets
import select
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

from dparallel.problems.patience import MOST, Patience
from dparallel.problems.sandbox import confinement
from dparallel.problems.sandbox.inside import judge
from dparallel.problems.sandbox.jobs import WEAKER, Job, Limits, Mode, Outcome, SandboxError
from dparallel.problems.sandbox.process import confined, pipe

READY_SECONDS = 60.0  # a candidate's time begins after that
LONGEST = 4096  # bytes of a verdict
TRIES = 2  # of a job of which a process was killed
ENDING_SECONDS = 1.0  # for the end of a process after its last words
KILLED = (137, -9)  # exit codes of a sandbox whose process was killed
OUT_OF_TIME = (152, -24)  # by SIGXCPU


def run_all(jobs: Sequence[Job], mode: Mode = "bubblewrap", workers: int | None = None) -> list[Outcome]:
    """Outcomes in the order of the jobs.

    Args:
        workers: jobs at a time; by default two for each core that this process may use, since starting a
            sandbox includes waiting.

    Raises:
        SandboxError: see `run_tests`.
    """
    workers = 2 * len(os.sched_getaffinity(0)) if workers is None else workers
    if workers < 1:
        raise SandboxError(f"workers={workers}: give at least 1")
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(functools.partial(run_tests, mode=mode), jobs))


def run_tests(job: Job, mode: Mode = "bubblewrap") -> Outcome:
    """Run a candidate against its tests.

    A candidate that uses up its CPU time, or its wall-clock time without waiting for a CPU, fails. If one of
    the processes was killed, as the system does when the machine has no memory left, the job is run again;
    a candidate that is killed every time fails.

    Raises:
        SandboxError: the sandbox does not start; the message says why, and what to do.
    """
    for _ in range(TRIES):
        outcome, killed = _tried(job, mode)
        if not killed:
            break
    return outcome


def _tried(job: Job, mode: Mode) -> tuple[Outcome, bool]:
    """The outcome of a run, and whether it failed because a process was killed."""
    token = secrets.token_hex(16).encode()
    limits = job.limits
    with contextlib.ExitStack() as stack:
        (asked, asks), (answered, answers), (verdict, says) = (stack.enter_context(pipe()) for _ in range(3))
        reasons, complaints = stack.enter_context(pipe())
        candidate = {"source": job.candidate, "requests": asked.fileno(), "replies": answers.fileno()}
        tests: dict[str, Any] = {
            "tests": job.tests,
            "trusted": job.trusted,
            "entry_points": job.entry_points,
            "token": token,
        }
        tests |= {"requests": asks.fileno(), "replies": answered.fileno(), "verdict": says.fileno()}
        of_candidate, of_tests = (
            stack.enter_context(
                confined(mode, limits, function, {**arguments, "limit": limits.message}, ends, complaints)
            )
            for function, arguments, ends in (
                (("candidate", "serve"), candidate, (asked, answers)),
                (("judge", "run"), tests, (asks, answered, says)),
            )
        )
        for end in (asked, answers, asks, answered, says, complaints):
            end.close()  # the processes hold them now, and their end is seen
        processes = [of_candidate.pid, of_tests.pid]
        starting = Patience(processes, READY_SECONDS)
        if _read(verdict, len(judge.READY), starting) != judge.READY and starting.state != "lost":
            for process in (of_candidate, of_tests):
                process.kill()
            raise _not_started(mode, reasons)
        began, running = time.monotonic(), Patience(processes, limits.wall)
        said = _read(verdict, LONGEST, running) if starting.state != "lost" else None
        seconds = time.monotonic() - began
        ended = _ended(said, of_candidate, of_tests)
        passed, note = _judgement(said, ended, token, limits)
        if "lost" in (starting.state, running.state):
            passed, note = None, f"this machine was too busy to run it in {MOST * limits.wall:g} s"
    outcome = Outcome(passed, f"[{mode}: weaker sandbox] {note}" if mode in WEAKER else note, seconds, mode)
    return outcome, not passed and ended in KILLED


@functools.cache
def check_sandbox(mode: Mode = "bubblewrap") -> None:
    """Check that generated code can be run on this machine, by a trial.

    Raises:
        SandboxError: names what is missing, and the remedy.
    """
    outcome = run_tests(Job("def double(x): return 2 * x", "assert double(21) == 42"), mode)
    if not outcome.passed:
        raise SandboxError(f"sandbox mode {mode!r}: a correct program failed its test: {outcome.note}")


def _ended(
    said: bytes | None, of_candidate: subprocess.Popen[bytes], of_tests: subprocess.Popen[bytes]
) -> int | None:
    """Exit code of the process that ended first, the candidate's or else that of the tests."""
    if said is None:
        return None
    if not said.startswith(judge.FAILED):
        return _exit_code(of_tests)
    return _exit_code(of_candidate) if said.startswith(judge.FAILED + judge.GONE.encode()) else None


def _judgement(
    said: bytes | None, ended: int | None, token: bytes, limits: Limits
) -> tuple[bool | None, str]:
    """Whether the candidate passes, and what is to be said about it.

    Args:
        said: what the tests' process wrote; None if it wrote nothing in time.
        ended: see `_ended`.
    """
    if said is None:
        return False, f"no verdict after {limits.wall:g} s"
    if said == judge.PASSED + token and ended == 0:
        return True, "passed"
    if not said.startswith(judge.FAILED):
        return False, f"the process of the tests ended without a verdict{_how(ended, limits)}"
    note = said.removeprefix(judge.FAILED).decode("utf-8", "replace")
    return False, f"the candidate ended{how}" if (how := _how(ended, limits)) else note


def _how(ended: int | None, limits: Limits) -> str:
    if ended in OUT_OF_TIME:
        return f": it used its {limits.seconds:g} s of CPU time"
    return ": it was killed" if ended in KILLED else ""


def _not_started(mode: Mode, reasons: BinaryIO) -> SandboxError:
    said = " ".join((_read(reasons, LONGEST, Patience([], 1.0)) or b"").decode("utf-8", "replace").split())[
        -500:
    ]
    return SandboxError(
        f"the sandbox mode {mode!r} does not start ({said or 'no message'}): {confinement.remedy(said)}"
    )


def _read(end: BinaryIO, most: int, patience: Patience) -> bytes | None:
    """What is written up to `most` bytes or the end; None if the time is over before."""
    poll = select.poll()
    poll.register(end, select.POLLIN)
    content = b""
    while len(content) < most:
        left = max(patience.next - time.monotonic(), 0.0)
        if poll.poll(math.ceil(left * 1000)):
            part = os.read(end.fileno(), most - len(content))
            if not part:
                break
            content += part
        elif patience.look() != "going":
            return None
    return content


def _exit_code(process: subprocess.Popen[bytes]) -> int | None:
    """How a process ended; None if it goes on for `ENDING_SECONDS`."""
    patience = Patience([process.pid], ENDING_SECONDS)
    while True:
        try:
            return process.wait(max(patience.next - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            if patience.look() != "going":
                return None
