"""Only one run at a time works in a stage's folder: a file there says which.

The holder renews the file's time every few seconds. A lease is taken over if its holder is gone: its process
has ended on this machine, or nothing renews its file from another one. Clocks of machines may differ, so
that is seen by watching the file, not by reading its time.
"""

import contextlib
import errno
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
from pydantic import BaseModel, ConfigDict, ValidationError

from dparallel.stages.files import naming_the_file
from dparallel.stages.manifest import CLAIM, StageError

log = logging.getLogger(__name__)

LEASE = "lease.json"
IN_USE = "is in use by"
RENEWED_EVERY = 10.0  # seconds
STALE_AFTER = 120.0  # seconds without renewal: shared file systems show a file's time up to a minute late
SAME_START = 1.0  # seconds by which the start of a process may differ between two readings
SAID_EVERY = 60.0  # seconds between the messages of a run that waits


class LeaseHeldError(StageError):
    """Another run works in the folder; the message names its process, its machine and since when."""


class Holder(BaseModel):
    """A run that works in a folder. `machine` changes with a reboot and with the namespace of process ids."""

    model_config = ConfigDict(frozen=True)

    token: str = ""
    pid: int = 0
    host: str = "an unknown machine"
    machine: str = ""
    process_started: float = 0.0
    since: str = "an unknown time"

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    @property
    def is_of_this_machine(self) -> bool:
        return self.machine == this_machine()


class Watch:
    """A lease seen from outside, again and again."""

    def __init__(self, folder: str | Path, stale_after: float = STALE_AFTER):
        self.path = Path(folder) / LEASE
        self.stale_after = stale_after
        self.found: tuple[Holder, int] | None = None  # at the last look: the holder and when it renewed
        self._seen: tuple[Holder, int] | None = None
        self._seen_since = 0.0

    def holder(self) -> Holder | None:
        """The live run that holds the lease; None if there is none, or it is gone."""
        self.found = _read(self.path)
        if self.found is None:
            return None
        holder = self.found[0]
        if holder.is_of_this_machine:
            return holder if _is_running(holder) else None
        if self.found != self._seen:
            self._seen, self._seen_since = self.found, time.monotonic()
        return holder if time.monotonic() - self._seen_since <= self.stale_after else None

    def looks_stale(self) -> bool:
        """Whether the file is older than it should be, by the clock that stamps files in its folder."""
        found = _read(self.path)
        if found is None:
            return False
        probe = self.path.with_name(f".{LEASE}.{uuid4().hex}.partial")
        try:
            probe.touch()
            return (probe.stat().st_mtime_ns - found[1]) / 1e9 > self.stale_after
        finally:
            probe.unlink(missing_ok=True)


@contextlib.contextmanager
def held(
    folder: str | Path, renewed_every: float = RENEWED_EVERY, stale_after: float = STALE_AFTER
) -> Iterator[Callable[[], None]]:
    """Hold the lease of a stage's folder; gives a function that raises `StageError` if it was lost.

    A lease of another machine that looks stale is watched for `stale_after` seconds, then taken over.

    Raises:
        LeaseHeldError: another run holds it. Nothing there was changed.
    """
    path, mine = Path(folder) / LEASE, _this_process()
    watch = Watch(folder, stale_after)
    while not _create(path, mine):
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
                f"{folder} was taken over by {found[0] if found else 'another run'} while this run gave no "
                "sign of life: this one ends here; run the same again when the other has ended"
            )

    stopped = threading.Event()
    renewal = threading.Thread(target=_renew, args=(path, mine, stopped, renewed_every), daemon=True)
    renewal.start()
    try:
        yield check
    finally:
        stopped.set()
        renewal.join()
        if (found := _read(path)) is not None and found[0] == mine:
            path.unlink(missing_ok=True)


def wait_until_free(
    folder: str | Path, say: Callable[[str], None], every: float = 1.0, stale_after: float = STALE_AFTER
) -> None:
    """Return once no live run holds the folder's lease.

    Args:
        say: receives a line at once and then every minute while it is held.
    """
    watch, said_at = Watch(folder, stale_after), -SAID_EVERY
    while (holder := watch.holder()) is not None:
        if time.monotonic() - said_at >= SAID_EVERY:
            say(f"{folder} {IN_USE} {holder}: waiting for its result")
            said_at = time.monotonic()
        time.sleep(every)


def this_machine() -> str:
    """A running system and a namespace of process ids: in it, a process id means one process."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip())
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return "/".join(parts)


def _this_process() -> Holder:
    return Holder(
        token=uuid4().hex,
        pid=os.getpid(),
        host=socket.gethostname(),
        machine=this_machine(),
        process_started=psutil.Process().create_time(),
        since=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _is_running(holder: Holder) -> bool:
    """Whether a holder of this machine still runs; its process id may be another process's by now."""
    try:
        process = psutil.Process(holder.pid)
        same = abs(process.create_time() - holder.process_started) < SAME_START
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _read(path: Path) -> tuple[Holder, int] | None:
    """The holder and when its file was renewed; an unknown holder where the file is damaged."""
    try:
        with path.open("rb") as file:
            renewed, text = os.fstat(file.fileno()).st_mtime_ns, file.read()
    except FileNotFoundError:
        return None
    try:
        return Holder.model_validate_json(text), renewed
    except ValidationError:
        return Holder(), renewed


def _create(path: Path, mine: Holder) -> bool:
    """Make the lease's file, whole from the start; False if there is one already."""
    whole = path.with_name(f".{LEASE}.{mine.token}.partial")
    try:
        with naming_the_file(path):
            whole.write_text(mine.model_dump_json(), encoding="utf-8")
        os.link(whole, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):  # no links there
            raise
        return _create_in_place(path, mine)
    finally:
        whole.unlink(missing_ok=True)
    return True


def _create_in_place(path: Path, mine: Holder) -> bool:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(mine.model_dump_json())
    except FileExistsError:
        return False
    return True


def _remove(path: Path, stale: tuple[Holder, int] | None) -> None:
    """Remove the lease of a holder that is gone; runs that see it at once look again, one after the other."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # no locks there: then two may take over at the same moment
            claim = stack.enter_context(path.with_name(CLAIM).open("r+b"))
            fcntl.flock(claim, fcntl.LOCK_EX)
        if stale is not None and _read(path) == stale:
            log.warning("%s was in use by %s, which is gone; its lease is taken over", path.parent, stale[0])
            path.unlink(missing_ok=True)


def _renew(path: Path, mine: Holder, stopped: threading.Event, every: float) -> None:
    while not stopped.wait(every):
        with contextlib.suppress(OSError):  # a share that is away for a moment
            found = _read(path)
            if found is not None and found[0] == mine:
                os.utime(path)
