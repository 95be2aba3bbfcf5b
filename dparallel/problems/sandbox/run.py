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

from dparallel.problems.sandbox import confinement
from dparallel.problems.sandbox.inside import judge
from dparallel.problems.sandbox.jobs import WEAKER, Job, Limits, Mode, Outcome, SandboxError
from dparallel.problems.sandbox.process import confined, pipe

READY_SECONDS = 60.0  # a busy machine may take long to start a process; a candidate's time begins after that
LONGEST = 4096  # bytes of a verdict
KILLED = (137, -9)  # exit codes of a sandbox whose process was killed


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

    Raises:
        SandboxError: the sandbox does not start; the message says why, and what to do.
    """
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
        if _read(verdict, len(judge.READY), READY_SECONDS) != judge.READY:
            for process in (of_candidate, of_tests):
                process.kill()
            raise _not_started(mode, reasons)
        began = time.monotonic()
        said = _read(verdict, LONGEST, limits.wall)
        seconds = time.monotonic() - began
        passed = said == judge.PASSED + token and _exit_code(of_tests, READY_SECONDS) == 0
        note = "passed" if passed else _note(said, limits, of_candidate)
    return Outcome(passed, f"[{mode}: weaker sandbox] {note}" if mode in WEAKER else note, seconds, mode)


@functools.cache
def check_sandbox(mode: Mode = "bubblewrap") -> None:
    """Check that generated code can be run on this machine, by a trial.

    Raises:
        SandboxError: names what is missing, and the remedy.
    """
    outcome = run_tests(Job("def double(x): return 2 * x", "assert double(21) == 42"), mode)
    if not outcome.passed:
        raise SandboxError(f"sandbox mode {mode!r}: a correct program failed its test: {outcome.note}")


def _note(said: bytes | None, limits: Limits, candidate: subprocess.Popen[bytes]) -> str:
    if said is None:
        return f"no verdict after {limits.wall:g} s"
    if not said.startswith(judge.FAILED):
        return "the process of the tests ended without a verdict"
    note = said.removeprefix(judge.FAILED).decode("utf-8", "replace")
    if note.startswith(judge.GONE) and _exit_code(candidate, 1.0) in KILLED:
        return f"the candidate was killed; its limit is {limits.seconds:g} s of CPU time"
    return note


def _not_started(mode: Mode, reasons: BinaryIO) -> SandboxError:
    said = " ".join((_read(reasons, LONGEST, 1.0) or b"").decode("utf-8", "replace").split())[-500:]
    return SandboxError(
        f"the sandbox mode {mode!r} does not start ({said or 'no message'}): {confinement.remedy(said)}"
    )


def _read(end: BinaryIO, most: int, seconds: float) -> bytes | None:
    """What is written up to `most` bytes or the end; None if the time is over before."""
    until = time.monotonic() + seconds
    poll = select.poll()
    poll.register(end, select.POLLIN)
    content = b""
    while len(content) < most:
        left = until - time.monotonic()
        if left <= 0 or not poll.poll(math.ceil(left * 1000)):
            return None
        part = os.read(end.fileno(), most - len(content))
        if not part:
            break
        content += part
    return content


def _exit_code(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
