"""Call a function on many items in worker processes, each call with a time limit.

An item whose call hangs, raises, or ends its process costs only itself: the process is killed and replaced
(`concurrent.futures` can do neither). The time that a worker waits for a CPU does not count (`Patience`). A
call that computes all its time has timed out. One that waited most of it, or ended its process, is repeated
once, with twice the time and after the others, since the disk or the memory of the machine may have been the
reason. Where the machine was too busy to tell, there is no result.
"""

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import cloudpickle

from dparallel.config.base import UserError
from dparallel.problems import worker
from dparallel.problems.patience import MOST, Patience

PACKAGE = Path(__file__).parents[1]
MOST_WORKERS = 64
START_SECONDS = 120.0  # for starting a process and importing the function
MEMORY = 4 << 30  # bytes of data of a worker; a larger allocation raises a MemoryError there
LARGEST_SETUP = 64 << 20  # bytes of a function with all that it refers to
LARGEST_REPLY = 1 << 20  # bytes
COMPUTING = 0.5  # share of its time that a call must have used of a CPU to have timed out at once
LONGER = 2  # times the limit that a repeated call has


class PoolError(UserError):
    """Worker processes cannot be used; the message names the reason and the remedy."""


@dataclass(frozen=True)
class Outcome:
    """Result of a call: a JSON value, or why there is none.

    Attributes:
        lost: whether the machine and not the call is the reason, so that another try may succeed.
    """

    value: Any = None
    failure: str | None = None
    lost: bool = False


class MachineBusy(Exception):
    """Raised by a call that found the machine too busy to tell its result; workers know it by its name."""


def nothing() -> None:
    """No preparation."""


def call_each(
    function: Callable[..., Any],
    items: Sequence[tuple[Any, ...]],
    seconds: float,
    prepare: Callable[[], None] = nothing,
    workers: int | None = None,
) -> Generator[tuple[int, Outcome], None, None]:
    """Call `function(*item)` for all items; yields the index of an item and its outcome when it is done.

    Close the iterator (`contextlib.closing`) to end all workers early. They also end with this process.

    Args:
        function: returns a JSON value. Workers import it by name; functions of the running script, lambdas
            and closures are sent to them as code, with the variables that they refer to.
        seconds: limit of each call, as `Patience` counts it.
        prepare: called in every worker before its first item, for imports that take long.
        workers: number of processes; by default one for each CPU that this process may use.

    Raises:
        PoolError: a function cannot be sent to workers, or raised a UserError: it cannot work here.
        RuntimeError: a worker cannot be started.
    """
    if not items:
        return
    setup = _setup(function, prepare)
    count = min(workers or len(os.sched_getaffinity(0)), len(items), MOST_WORKERS)
    waiting, staff, repeated = deque(enumerate(items)), list[_Worker](), set[int]()
    try:
        while waiting or any(member.index is not None for member in staff):
            while len(staff) < count and len(staff) < len(waiting) + sum(
                member.index is not None for member in staff
            ):
                staff.append(_Worker(setup))
            for member in staff:
                if waiting and member.ready and member.index is None:
                    number, item = waiting.popleft()
                    member.start(number, item, seconds * (LONGER if number in repeated else 1))
            for member in _heard_of(staff):
                index, outcome = member.index, member.outcome()
                if member.ended:
                    staff.remove(member)
                if index is None or outcome is None:
                    continue
                if member.repeatable and index not in repeated:
                    repeated.add(index)
                    waiting.append((index, items[index]))
                else:
                    yield index, outcome
    finally:
        for member in staff:
            member.kill()


def _setup(function: Callable[..., Any], prepare: Callable[[], None]) -> bytes:
    """What a worker reads first."""
    try:
        pickled = cloudpickle.dumps((function, prepare))
    except Exception as error:  # of any class: whatever `__reduce__` of a variable raises
        raise PoolError(
            f"a function cannot be sent to worker processes ({worker.describe(error)}): {REMEDY}"
        ) from error
    if len(pickled) > LARGEST_SETUP:
        raise PoolError(
            f"a function refers to {len(pickled) >> 20} MiB of variables, and at most "
            f"{LARGEST_SETUP >> 20} MiB are sent to worker processes: {REMEDY}"
        )
    return pickle.dumps((sys.path, str(PACKAGE), MEMORY, pickled))


REMEDY = (
    "put it into a module that can be imported, and let it open what it needs (models, files, locks) itself"
)


def _heard_of(staff: "Sequence[_Worker]") -> "list[_Worker]":
    """Wait until some workers have replied or ended, or it is time to look at them, and return these."""
    left = min(member.patience.next for member in staff) - time.monotonic()
    replied = wait([member.connection for member in staff], max(left, 0.0))
    now = time.monotonic()
    return [member for member in staff if member.connection in replied or member.patience.next <= now]


class _Worker:
    """A process.

    Attributes:
        index: number of the item it works on; None while it starts or waits for one.
        repeatable: whether the last item may succeed in another try.
    """

    def __init__(self, setup: bytes):
        self.connection, theirs = Pipe()
        command = [sys.executable, "-P", worker.__file__, str(theirs.fileno()), str(os.getpid())]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C does not reach it, and it is killed together with its children
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        self.index: int | None = None
        self.ended = False
        self.ready = False
        self.repeatable = False
        self.patience = Patience([self.process.pid], START_SECONDS)
        with contextlib.suppress(ConnectionError):  # noticed when the reply is read
            self.connection.send_bytes(setup)

    def start(self, index: int, item: tuple[Any, ...], seconds: float) -> None:
        """Give it an item."""
        self.index, self.patience = index, Patience([self.process.pid], seconds)
        with contextlib.suppress(ConnectionError):
            self.connection.send_bytes(pickle.dumps(item))

    def outcome(self) -> Outcome | None:
        """The outcome of its item; None if there is none yet, or it had none. It is killed if it fails."""
        self.repeatable = False
        if not self.connection.poll():
            state = "going" if self.ready and self.index is None else self.patience.look()
            if state == "going":
                return None
            reply, failed = self._timed_out(state == "lost")
        else:
            reply, failed = self._reply()
        if "refused" in reply:
            raise PoolError(reply["refused"])
        if not self.ready and "ready" not in reply:
            reason = reply.get("broken") or (failed and failed.failure)
            raise RuntimeError(f"a worker process could not be started: {reason}")
        self.ready = True
        if failed is not None:
            return failed
        self.index = None
        return Outcome(reply.get("value"), reply.get("error") or reply.get("lost"), lost="lost" in reply)

    def _timed_out(self, lost: bool) -> tuple[dict[str, Any], Outcome | None]:
        self.kill()
        self.repeatable = not lost and self.patience.used < COMPUTING * self.patience.seconds
        if lost:
            passed = f"this machine was too busy to judge it in {MOST * self.patience.seconds:g} s"
            return {}, Outcome(failure=passed, lost=True)
        return {}, Outcome(failure=f"timed out after {self.patience.seconds:g} s")

    def _reply(self) -> tuple[dict[str, Any], Outcome | None]:
        """What it says, or why that is no reply."""
        try:
            reply = json.loads(self.connection.recv_bytes(LARGEST_REPLY))
            if isinstance(reply, dict):
                return reply, None
            reason = "no proper reply of the process that judged it"
        except (EOFError, ConnectionError):
            reason = f"the process that judged it ended ({_how(self.kill())})"
        except ValueError:  # the function wrote to the socket
            reason = "no proper reply of the process that judged it"
        except OSError:  # the reply is too large
            reason = f"more than {LARGEST_REPLY} bytes of result"
        self.kill()
        self.repeatable = True
        return {}, Outcome(failure=reason)

    def kill(self) -> int:
        """End the process and its children; returns its exit code."""
        self.ended = True
        self.connection.close()
        if self.process.returncode is None:  # not waited for yet, so its number is not used again
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
