"""Share work with other processes: request it until its files exist, and never make a file twice at once."""

import contextlib
import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from dparallel.stages.files import making
from dparallel.stages.manifest import StageError

log = logging.getLogger(__name__)

ROUNDS = 3  # requests for missing work: the second and third repeat what was lost
NAMED = 5  # items of missing work listed in a message
SAID_EVERY = 60.0  # seconds between two messages while waiting

Work = TypeVar("Work")


def have_made(
    wanted: Sequence[Work],
    ask: Callable[[list[Work]], Sequence[str]],
    is_missing: Callable[[Work], bool],
    name: Callable[[Work], str],
    noun: str,
    folder: Path,
) -> None:
    """Request `wanted` until everything exists; work lost in one round is divided again in the next.

    Args:
        ask: has the work done by other processes, waits, and returns descriptions of failures.
        is_missing: whether the result of an item is missing.
        name: name of an item, for messages.
        noun: name of several items, for messages.
        folder: where the results belong, for messages.

    Raises:
        StageError: results are missing after `ROUNDS` rounds, or after a round without failures.
    """
    missing, failures = list(wanted), list[str]()
    for _ in range(ROUNDS):
        if not missing:
            return
        log.info("having %d %s made by other processes", len(missing), noun)
        failures = list(ask(missing))
        missing = [work for work in missing if is_missing(work)]
        if not failures:
            break
        log.warning("%d of %d %s are missing after: %s", len(missing), len(wanted), noun, "; ".join(failures))
    if missing:
        named = "; ".join(map(name, missing[:NAMED]))
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        why = failures[-1] if failures else "all runs completed: do all workers share this folder?"
        raise StageError(
            f"{folder}: {len(missing)} of {len(wanted)} {noun} are still missing: {named}{more}; {why}\n"
            "Run the stage again; it makes only these."
        )


@contextlib.contextmanager
def in_turn(
    items: Iterable[Work],
    file: Callable[[Work], Path],
    is_missing: Callable[[Work], bool],
    noun: str,
    every: float = 1.0,
) -> Iterator[Iterator[tuple[Work, bool]]]:
    """Go through work that other processes may do as well; what they are doing comes last.

    Yields an iterator over every item once: with True while this process has claimed it, to be done now; with
    False when another process has done it. An item whose process ended without a result is claimed.

    Args:
        file: the file of an item, by which it is claimed.
        is_missing: whether the result of an item is missing.
        noun: name of several items, for messages.
        every: seconds between two looks at what other processes are doing.
    """
    with contextlib.closing(_turns(items, file, is_missing, noun, every)) as turns:
        yield turns


def _turns(
    items: Iterable[Work],
    file: Callable[[Work], Path],
    is_missing: Callable[[Work], bool],
    noun: str,
    every: float,
) -> Generator[tuple[Work, bool], None, None]:
    left, said_at = list(items), -SAID_EVERY
    while left:
        busy = []
        for item in left:
            if not is_missing(item):
                yield item, False
                continue
            with making(file(item)) as mine:
                if mine:
                    yield item, is_missing(item)
                else:
                    busy.append(item)
        if busy and len(busy) == len(left):
            if time.monotonic() - said_at >= SAID_EVERY:
                log.info("%d %s are being made by other processes: waiting for them", len(busy), noun)
                said_at = time.monotonic()
            time.sleep(every)
        left = busy
