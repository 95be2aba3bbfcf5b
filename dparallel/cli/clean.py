"""`dparallel clean`: show what no kept result refers to, and remove it after a question."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from dparallel.config.base import UserError
from dparallel.preflight.units import size, sizes
from dparallel.reporting.cleaning import (
    Removal,
    named_stages,
    removals,
    remove,
    remove_empty,
    results_to_give_up,
    stores_that_keep,
    what_stays,
)
from dparallel.reporting.past import past_experiments
from dparallel.stages.lease import LeaseHeldError


def clean(given: Sequence[str], runs: Path, keep: int | None, checkpoints: bool, yes: bool) -> None:
    """Show what can be removed, ask, and remove it.

    Args:
        given: experiments, reports or stages that are not needed any more.
        runs: folder of runs.
        keep: how many results of each benchmark of an experiment are kept, the latest; None keeps all.
        checkpoints: also remove the checkpoints of finished trainings.
        yes: do not ask.

    Raises:
        UserError: `runs` or one of `given` is not there, or files cannot be removed.
    """
    experiments = past_experiments(runs)
    given_up = dict[Path, str]()
    if keep is not None:
        given_up |= dict.fromkeys(results_to_give_up(experiments, keep), f"older than --keep {keep}")
    for name in given:
        given_up |= dict.fromkeys(named_stages(name, runs, experiments), f"named: {name}")
    found, notes = removals(runs, experiments, given_up, checkpoints)
    notes += [*stores_that_keep(experiments, found), *([what_stays(experiments, found)] if found else [])]
    print("\n".join([_table(found, runs), *notes] if found else ["Nothing to remove.", *notes]))
    if not found:
        return
    if not yes and not _agreed():
        print("Nothing was removed.")
        return
    freed = sum(map(_remove, found))
    remove_empty(experiments)
    print(f"Removed {size(freed)}.")


def _table(found: Sequence[Removal], runs: Path) -> str:
    held = [removal.bytes for removal in found]
    rows = [
        [_place(removal, runs), text, removal.why] for removal, text in zip(found, sizes(held), strict=True)
    ]
    body = tabulate(rows, ["to remove", "size", "why"], tablefmt="simple", colalign=["left", "right", "left"])
    return f"{body}\n\n{size(sum(held))} in all, in {runs}."


def _place(removal: Removal, runs: Path) -> str:
    path = removal.paths[0] if len(removal.paths) == 1 else removal.folder
    name = path.relative_to(runs).as_posix()
    if len(removal.paths) == 1:
        return name
    folders = sum(os.path.isdir(path) for path in removal.paths)
    counts = {"file": len(removal.paths) - folders, "folder": folders}
    texts = [f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in counts.items() if count]
    return f"{name}: {' and '.join(texts)} in it"


def _agreed() -> bool:
    """Whether the user agrees; without a terminal, a command needs --yes."""
    if not sys.stdin.isatty():
        print("Not a terminal, so nothing is asked: give --yes to remove it.")
        return False
    print("Remove it? [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _remove(removal: Removal) -> int:
    """Remove it; returns the bytes freed, 0 if it came into use meanwhile."""
    freed = removal.bytes
    try:
        remove(removal)
    except LeaseHeldError as error:
        print(f"Kept: {error}", file=sys.stderr)
        return 0
    except OSError as error:
        raise UserError(
            f"{error.filename or removal.folder} cannot be removed ({error.strerror or error}): check its "
            "permissions, and give the same command again"
        ) from error
    return freed
