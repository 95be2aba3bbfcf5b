"""Run a stage between what is pulled from a store and what is pushed to it."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from dparallel.stages.manifest import MANIFEST, Manifest, StageError
from dparallel.stages.storage import lease
from dparallel.stages.storage.folders import Storage
from dparallel.stages.storage.remote import StorageError

log = logging.getLogger(__name__)

PUSHED_EVERY = 5.0  # seconds between two looks for new shards and checkpoints

Item = TypeVar("Item")


def run(
    storage: Storage,
    folder: str | Path,
    inputs: Iterable[str],
    work: Callable[[], Manifest],
    say: Callable[[str], None],
) -> Manifest:
    """Run `work`, which finishes a stage or finds it finished, and keep its result in the store.

    A stage that is finished in the store is pulled. Otherwise this run holds the stage's lease there, goes on
    from what earlier runs left, and writes new shards and checkpoints to the store while it works.

    Args:
        inputs: folders of the stage's inputs; those of `runs` are pulled.
        say: called with a message while another run works on the stage.

    Raises:
        StorageError: the store cannot be read or written, or holds another result of this stage.
        StageError: another run took over the lease.
    """
    if (done := storage.pull(folder)) is not None:
        pull_stages(storage, inputs)
        made = work()
        if made.fingerprint != done.fingerprint:  # it was opened again
            storage.push(folder, replaces=done)
        return made
    with lease.held(storage.remote, storage.name(folder), say) as still_held:
        if storage.pull(folder) is None:  # by another run meanwhile
            storage.pull_unfinished(folder)
        pull_stages(storage, inputs)
        with pushing(storage, folder, still_held):
            made = work()
        still_held()
        storage.push(folder)
    return made


def help_with(storage: Storage, folder: str | Path, work: Callable[[], None]) -> None:
    """Run `work`, which makes files of a stage that another run finishes, and write them to the store."""
    storage.pull_unfinished(folder)
    with pushing(storage, folder):
        work()


def through(
    delegate: Callable[[list[Item]], Sequence[str]], storage: Storage, folder: str | Path
) -> Callable[[list[Item]], Sequence[str]]:
    """A function that has files of a stage made by other machines, and brings them here."""

    def ask(work: list[Item]) -> Sequence[str]:
        storage.push_unfinished(folder)
        failures = delegate(work)
        storage.pull_unfinished(folder)
        return failures

    return ask


def bringing(
    delegate: Callable[[list[Item]], Sequence[str]], storage: Storage
) -> Callable[[list[Item]], Sequence[str]]:
    """A function that has samples and verdicts made by other machines, and brings them here."""

    def ask(work: list[Item]) -> Sequence[str]:
        failures = delegate(work)
        storage.bring_again()
        return failures

    return ask


def pull_stages(storage: Storage, folders: Iterable[str]) -> None:
    """Make folders whole that are finished stages of the store; others are left as they are."""
    for folder in folders:
        if storage.holds(folder):
            storage.pull(folder)


def pull_alike(storage: Storage, folder: str | Path) -> None:
    """Make the finished stages whole of the same kind and experiment as that of `folder`."""
    experiment, kind = Path(folder).parent, Path(folder).name.rpartition("-")[0]
    names = storage.remote.sizes(storage.name(experiment))
    pull_stages(
        storage,
        [
            str(experiment / name.partition("/")[0])
            for name in names
            if name.startswith(f"{kind}-") and name.partition("/")[2] == MANIFEST
        ],
    )


@contextlib.contextmanager
def pushing(
    storage: Storage, folder: str | Path, still_held: Callable[[], None] | None = None
) -> Iterator[None]:
    """Write new shards and checkpoints of a stage to the store, every few seconds and at the end.

    While the store is not available, nothing is written; the next time catches up.

    Args:
        still_held: raises a StageError if the lease was lost; then nothing more is written.

    Raises:
        StorageError: the store is not available at the end.
    """
    ended = threading.Event()

    def push() -> None:
        if still_held is not None:
            still_held()
        storage.push_unfinished(folder)

    def push_often() -> None:
        while not ended.wait(PUSHED_EVERY):
            try:
                push()
            except StorageError as error:
                log.warning("%s", error)
            except StageError as error:
                log.error("%s", error)
                return

    thread = threading.Thread(target=push_often, daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        ended.set()
        thread.join()
        with contextlib.suppress(StorageError, StageError):  # the first error is raised
            push()
        raise
    ended.set()
    thread.join()
    push()
