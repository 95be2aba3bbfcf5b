"""The lease of a stage in a store: only one run at a time, on whichever machine, works on it.

A lease is an object `leases/000001.json` that its holder writes again every few seconds with a higher count.
The newest number is the one that counts. Numbers are taken by a write that fails where an object exists, so
exactly one of several runs takes over a lease, and a holder that was asleep renews only its own object.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

from pydantic import BaseModel, ConfigDict, ValidationError

from dparallel.stages.lease import (
    IN_USE,
    RENEWED_EVERY,
    SAID_EVERY,
    STALE_AFTER,
    Holder,
    is_running,
    this_process,
)
from dparallel.stages.manifest import StageError
from dparallel.stages.storage.remote import Remote, StorageError

log = logging.getLogger(__name__)

LEASES = "leases"  # below a stage's name


class Lease(BaseModel):
    """Content of a lease's object; `count` is how often it was renewed."""

    model_config = ConfigDict(frozen=True)

    holder: Holder = Holder()
    count: int = 0
    released: bool = False


class Watch:
    """Repeated observation of a stage's lease from outside."""

    def __init__(self, remote: Remote, stage: str, stale_after: float = STALE_AFTER):
        self.remote, self.stage, self.stale_after = remote, stage, stale_after
        self.number = 0  # of the newest lease
        self._seen: tuple[int, Lease] | None = None
        self._seen_since = 0.0

    def holder(self) -> Holder | None:
        """The running holder of the lease; None if it is free or its holder is gone."""
        found = newest(self.remote, self.stage)
        if found is None:
            self.number = 0
            return None
        self.number, lease = found
        if lease.released:
            return None
        if lease.holder.is_of_this_machine:
            return lease.holder if is_running(lease.holder) else None
        if found != self._seen:
            self._seen, self._seen_since = found, time.monotonic()
        return lease.holder if time.monotonic() - self._seen_since <= self.stale_after else None


@contextlib.contextmanager
def held(
    remote: Remote,
    stage: str,
    say: Callable[[str], None],
    renewed_every: float = RENEWED_EVERY,
    stale_after: float = STALE_AFTER,
) -> Iterator[Callable[[], None]]:
    """Hold the lease of a stage; yields a function that raises a StageError if the lease was lost.

    While another run holds it, this one waits. A lease that is not renewed for `stale_after` seconds is taken
    over.

    Args:
        stage: name of the stage's folder in the store.
        say: called with a message immediately and then every minute while waiting.
    """
    mine = Lease(holder=this_process())
    number = _take(remote, stage, mine, say, min(1.0, renewed_every), stale_after)

    def check() -> None:
        found = newest(remote, stage)
        if found is None or found[0] != number:
            by = found[1].holder if found else "another run"
            raise StageError(
                f"{remote.url_of(stage)} was taken over by {by} while this run did not renew its lease; this "
                "run stops. Run the same again when the other run has ended"
            )

    stopped = threading.Event()
    renewal = threading.Thread(target=_renew, args=(remote, stage, number, mine, stopped, renewed_every))
    renewal.daemon = True
    renewal.start()
    try:
        yield check
    finally:
        stopped.set()
        renewal.join()
        with contextlib.suppress(StorageError):  # then it becomes stale
            remote.write(_name(stage, number), _content(mine.model_copy(update={"released": True})))
            remote.remove(_name(stage, older) for older in _numbers(remote, stage) if older < number)


def newest(remote: Remote, stage: str) -> tuple[int, Lease] | None:
    """Number and content of the newest lease of a stage; a default `Lease` if the object is damaged."""
    while numbers := _numbers(remote, stage):
        text = remote.read(_name(stage, numbers[-1]))
        if text is None:  # removed by the holder of a newer one
            continue
        try:
            return numbers[-1], Lease.model_validate_json(text)
        except ValidationError:
            return numbers[-1], Lease()
    return None


def _take(
    remote: Remote, stage: str, mine: Lease, say: Callable[[str], None], every: float, stale_after: float
) -> int:
    watch, said_at = Watch(remote, stage, stale_after), -SAID_EVERY
    while True:
        holder = watch.holder()
        if holder is None:
            number = watch.number + 1
            if remote.create(_name(stage, number), _content(mine)) or newest(remote, stage) == (number, mine):
                return number
            continue
        if time.monotonic() - said_at >= SAID_EVERY:
            say(f"{remote.url_of(stage)} {IN_USE} {holder}: waiting for its result")
            said_at = time.monotonic()
        time.sleep(every)


def _renew(
    remote: Remote, stage: str, number: int, mine: Lease, stopped: threading.Event, every: float
) -> None:
    count = 0
    while not stopped.wait(every):
        count += 1
        with contextlib.suppress(StorageError):  # the store may be unavailable for a moment
            remote.write(_name(stage, number), _content(mine.model_copy(update={"count": count})))


def _numbers(remote: Remote, stage: str) -> list[int]:
    names = remote.sizes(f"{stage}/{LEASES}")
    return sorted(int(name.removesuffix(".json")) for name in names if name.removesuffix(".json").isdigit())


def _name(stage: str, number: int) -> str:
    return f"{stage}/{LEASES}/{number:06d}.json"


def _content(lease: Lease) -> bytes:
    return lease.model_dump_json().encode()
