"""A lease ensures that only one run at a time works in a stage's folder.

The lease is a file whose modification time its holder renews every few seconds. It is taken over when its
holder is gone: a process on this machine has ended, or one on another machine no longer renews the file.
Clocks of machines may differ, so renewal is detected by watching the file instead of comparing times.
"""

import contextlib
import fcntl
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import psutil
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from dparallel.stages.files import create, is_there, new_partial, remove_partial, sweep
from dparallel.stages.manifest import StageError

log = logging.getLogger(__name__)

LEASE = "lease.json"
IN_USE = "is in use by"
RENEWED_EVERY = 10.0  # seconds
STALE_AFTER = 120.0  # seconds without renewal; network file systems may show times up to a minute late
SAID_EVERY = 60.0  # seconds between two messages while waiting


class LeaseHeldError(StageError):
    """Another run works in the folder; the message names its process, machine and start time."""


class Holder(BaseModel):
    """The run that holds a lease. `machine` identifies the boot and the namespace of process ids."""

    model_config = ConfigDict(frozen=True)

    token: str = ""
    pid: NonNegativeInt = 0
    host: str = "an unknown machine"
    machine: str = ""
    identity: int = 0  # of the process; differs from that of a later one with the same number
    since: str = "an unknown time"

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    @property
    def is_of_this_machine(self) -> bool:
        return self.machine == this_machine()


class Watch:
    """Repeated observation of a lease from outside."""

    def __init__(self, folder: str | Path, stale_after: float = STALE_AFTER):
        self.path = Path(folder) / LEASE
        self.stale_after = stale_after
        self.found: tuple[Holder, int] | None = None  # most recent observation: holder, time of renewal
        self._seen: tuple[Holder, int] | None = None
        self._seen_since = 0.0

    def holder(self) -> Holder | None:
        """The running holder of the lease; None if there is no lease or its holder is gone."""
        self.found = _read(self.path)
        if self.found is None:
            return None
        holder = self.found[0]
        if holder.is_of_this_machine:
            return holder if is_running(holder) else None
        if self.found != self._seen:
            self._seen, self._seen_since = self.found, time.monotonic()
        return holder if time.monotonic() - self._seen_since <= self.stale_after else None

    def looks_stale(self) -> bool:
        """Whether the file has not been renewed in time, measured with the clock of its file system."""
        found = _read(self.path)
        if found is None:
            return False
        file, probe = new_partial(self.path)
        try:
            with file:
                return (os.fstat(file.fileno()).st_mtime_ns - found[1]) / 1e9 > self.stale_after
        finally:
            remove_partial(probe)


@contextlib.contextmanager
def held(
    folder: str | Path, renewed_every: float = RENEWED_EVERY, stale_after: float = STALE_AFTER
) -> Iterator[Callable[[], None]]:
    """Hold the lease of a stage's folder; yields a function that raises `StageError` if the lease was lost.

    Temporary files and folders that a killed run left there are removed first.
    A lease of another machine that looks stale is watched for `stale_after` seconds, then taken over.

    Raises:
        LeaseHeldError: another run holds the lease; nothing was changed.
    """
    path, mine = Path(folder) / LEASE, this_process()
    watch = Watch(folder, stale_after)
    while not create(path, mine.model_dump_json().encode()):
        holder = watch.holder()
        if holder is None:
            _remove(path, watch.found)
        elif holder.is_of_this_machine or not watch.looks_stale():
            raise LeaseHeldError(
                f"{folder} {IN_USE} {holder}: run the same again when it has ended, which then finds its "
                "result, or end it first"
            )
        else:
            time.sleep(min(1.0, renewed_every))

    def check() -> None:
        found = _read(path)
        if found is None or found[0] != mine:
            raise StageError(
                f"{folder} was taken over by {found[0] if found else 'another run'} while this run did "
                "not renew its lease; this run stops. Run the same again when the other run has ended"
            )

    stopped = threading.Event()
    renewal = threading.Thread(target=_renew, args=(path, mine, stopped, renewed_every), daemon=True)
    renewal.start()
    try:
        sweep(path.parent, alone=True)
        yield check
    finally:
        stopped.set()
        renewal.join()
        if (found := _read(path)) is not None and found[0] == mine:
            path.unlink(missing_ok=True)


def wait_until_free(
    folder: str | Path, say: Callable[[str], None], every: float = 1.0, stale_after: float = STALE_AFTER
) -> None:
    """Wait until no running process holds the folder's lease.

    Args:
        say: called with a message immediately and then every minute while waiting.
    """
    watch, said_at = Watch(folder, stale_after), -SAID_EVERY
    while (holder := watch.holder()) is not None:
        if time.monotonic() - said_at >= SAID_EVERY:
            say(f"{folder} {IN_USE} {holder}: waiting for its result")
            said_at = time.monotonic()
        time.sleep(every)


def remove_left(folder: str | Path) -> None:
    """Remove the lease that processes of this machine left when they were stopped; others are kept."""
    watch = Watch(folder)
    if watch.holder() is None:
        _remove(watch.path, watch.found, log.debug)


def this_machine() -> str:
    """Identifies the boot and the namespace of process ids, within which a process id is unambiguous."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip())
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return "/".join(parts)


def this_process() -> Holder:
    return Holder(
        token=uuid4().hex,
        pid=os.getpid(),
        host=socket.gethostname(),
        machine=this_machine(),
        identity=hash(psutil.Process()),
        since=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def is_running(holder: Holder) -> bool:
    """Whether a holder on this machine still runs; its process id may have been reused since."""
    try:
        process = psutil.Process(holder.pid)
        # Of number and start since the boot: `create_time` moves when the clock is set.
        return hash(process) == holder.identity and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _read(path: Path) -> tuple[Holder, int] | None:
    """Holder and renewal time of a lease; a default `Holder` if the file is damaged."""
    if not is_there(path):
        return None
    try:
        with path.open("rb") as file:
            renewed, text = os.fstat(file.fileno()).st_mtime_ns, file.read()
    except FileNotFoundError:
        return None
    try:
        return Holder.model_validate_json(text), renewed
    except ValidationError:
        return Holder(), renewed


def _remove(path: Path, stale: tuple[Holder, int] | None, say: Callable[..., None] = log.warning) -> None:
    """Remove the lease of a holder that is gone; concurrent runs check it again one after another."""
    with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
        with contextlib.suppress(OSError):  # without file locks, two runs may take over at the same moment
            fcntl.flock(file, fcntl.LOCK_EX)
        is_same = os.path.samestat(os.fstat(file.fileno()), path.stat())  # not that of another run by now
        if is_same and stale is not None and _read(path) == stale:
            say("%s was in use by %s, which is gone; its lease is taken over", path.parent, stale[0])
            path.unlink(missing_ok=True)


def _renew(path: Path, mine: Holder, stopped: threading.Event, every: float) -> None:
    while not stopped.wait(every):
        with contextlib.suppress(OSError):  # a network share may be unavailable for a moment
            found = _read(path)
            if found is not None and found[0] == mine:
                os.utime(path)
