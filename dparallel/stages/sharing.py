"""Work that other processes do: asked for until its files are there."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from dparallel.stages.manifest import StageError

log = logging.getLogger(__name__)

ROUNDS = 3  # how often missing work is asked for: the second and third redo what was lost
NAMED = 5  # of what is missing, in a message

Work = TypeVar("Work")


def have_made(
    wanted: Sequence[Work],
    ask: Callable[[list[Work]], Sequence[str]],
    is_missing: Callable[[Work], bool],
    name: Callable[[Work], str],
    noun: str,
    folder: Path,
) -> None:
    """Ask for `wanted` until all is there; what one round lost, all workers share in the next.

    Args:
        ask: has the work done, waits, and returns what failed.
        name, noun: of one of them, and of several, in messages.
        folder: where it belongs.

    Raises:
        StageError: some is still missing after `ROUNDS` rounds, or after one where nothing failed.
    """
    missing, failures = list(wanted), list[str]()
    for _ in range(ROUNDS):
        if not missing:
            return
        log.info("having %d %s made elsewhere", len(missing), noun)
        failures = list(ask(missing))
        missing = [each for each in missing if is_missing(each)]
        if not failures:
            break
        log.warning("%d of %d %s are missing after: %s", len(missing), len(wanted), noun, "; ".join(failures))
    if missing:
        named = "; ".join(map(name, missing[:NAMED]))
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        why = failures[-1] if failures else "yet every run ended well: do all workers share this folder?"
        raise StageError(
            f"{folder}: {len(missing)} of {len(wanted)} {noun} are still missing: {named}{more}; {why}\n"
            "Run the stage again to make these alone."
        )
