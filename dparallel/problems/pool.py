"""Call a function on many items in worker processes, each call with a time limit.

An item whose call hangs, raises, or ends its process costs only itself: the process is killed and replaced
(`concurrent.futures` can do neither). A call that hung or ended its process is repeated once, since a busy
machine may have been the reason.
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

from dparallel.config.base import UserError
from dparallel.problems import worker

PACKAGE = Path(__file__).parents[1]
MOST_WORKERS = 64
START_SECONDS = 120.0  # for starting a process and importing the function
MEMORY = 4 << 30  # bytes of data of a worker; a larger allocation raises a MemoryError there
LARGEST_REPLY = 1 << 20  # bytes


class PoolError(UserError):
    """Worker processes cannot be used; the message names the reason and the remedy."""


@dataclass(frozen=True)
class Outcome:
    """Result of a call: a JSON value, or why there is none."""

    value: Any = None
    failure: str | None = None


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
        function: returns a JSON value; defined at the top level of a module, since workers import it by name
            (or a `functools.partial` of such functions).
        seconds: wall-clock limit of each call.
        prepare: called in every worker before its first item, for imports that take long.
        workers: number of processes; by default one for each CPU that this process may use.

    Raises:
        PoolError: a function cannot be imported by name, or raised a UserError: it cannot work here.
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
                    member.start(*waiting.popleft(), seconds)
            for member in _heard_of(staff):
                index, outcome = member.index, member.outcome(seconds)
                if member.ended:
                    staff.remove(member)
                if index is not None and member.ended and index not in repeated:
                    repeated.add(index)
                    waiting.append((index, items[index]))
                elif index is not None:
                    yield index, outcome
    finally:
        for member in staff:
            member.kill()


def _setup(function: Callable[..., Any], prepare: Callable[[], None]) -> bytes:
    """What a worker reads first."""
    try:
        pickled = pickle.dumps((function, prepare))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise PoolError(f"worker processes cannot import a function ({error}): {_TOP_LEVEL}") from error
    if b"__main__" in pickled:
        raise PoolError(f"worker processes do not run the script that is running now: {_TOP_LEVEL}")
    return pickle.dumps((sys.path, str(PACKAGE), MEMORY, pickled))


_TOP_LEVEL = "define the function at the top level of a module"


def _heard_of(staff: "Sequence[_Worker]") -> "list[_Worker]":
    """Wait until some workers have replied, ended or passed their deadline, and return these."""
    left = min(member.deadline for member in staff) - time.monotonic()
    replied = wait([member.connection for member in staff], min(max(left, 0.0), START_SECONDS))
    now = time.monotonic()
    return [member for member in staff if member.connection in replied or member.deadline <= now]


class _Worker:
    """A process; `index` is that of the item it works on, None while it starts or waits for one."""

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
        self.deadline = time.monotonic() + START_SECONDS
        with contextlib.suppress(ConnectionError):  # noticed when the reply is read
            self.connection.send_bytes(setup)

    def start(self, index: int, item: tuple[Any, ...], seconds: float) -> None:
        """Give it an item."""
        self.index, self.deadline = index, time.monotonic() + seconds
        with contextlib.suppress(ConnectionError):
            self.connection.send_bytes(pickle.dumps(item))

    def outcome(self, seconds: float) -> Outcome:
        """The outcome of its item, empty if it had none; it is killed if it does not reply properly."""
        reply, problem = self._reply(seconds if self.ready else START_SECONDS)
        if "refused" in reply:
            raise PoolError(reply["refused"])
        if not self.ready and "ready" not in reply:
            raise RuntimeError(f"a worker process could not be started: {reply.get('broken', problem)}")
        self.ready = True
        if problem is not None:
            return Outcome(failure=problem)
        self.index, self.deadline = None, float("inf")
        return Outcome(reply.get("value"), reply.get("error"))

    def _reply(self, seconds: float) -> tuple[dict[str, Any], str | None]:
        if not self.connection.poll():
            self.kill()
            return {}, f"timed out after {seconds:g} s"
        try:
            reply = json.loads(self.connection.recv_bytes(LARGEST_REPLY))
            assert isinstance(reply, dict)
            return reply, None
        except (EOFError, ConnectionError):
            return {}, f"the process that judged it ended ({_how(self.kill())})"
        except (ValueError, AssertionError):  # the function wrote to the socket
            self.kill()
            return {}, "no proper reply of the process that judged it"
        except OSError:  # the reply is too large
            self.kill()
            return {}, f"more than {LARGEST_REPLY} bytes of result"

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
