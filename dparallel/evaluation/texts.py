"""Cells that all tables of measurements have in common."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dparallel.evaluation.metrics import RESAMPLES
from dparallel.problems.sandbox.jobs import WEAKER

INTERVAL = (
    "± is one standard error; in brackets Wilson's 95 % interval, which also holds for few problems (n)."
)
MEASURED = (
    "Measured: the days (UTC) on which the responses were decoded. Reused ones are of an earlier run, "
    "and so are their times."
)
WEAKER_SANDBOX = (
    "§ the generated code was judged in a weaker sandbox than bubblewrap, which was asked for by "
    "DPARALLEL_SANDBOX=unshare."
)


KINDS = ("metrics", "scores", "graded", "pooled", "lower_is_better")  # fields of a `Measurement`


def interval_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the standard errors and intervals of a table are.

    Args:
        rows: the fields `KINDS` of measurements.
    """
    found = {kind: list(dict.fromkeys(name for row in rows for name in row[kind])) for kind in KINDS}
    notes = []
    if any(name not in (*row["graded"], *row["pooled"]) for row in rows for name in row["metrics"]):
        notes.append(INTERVAL)
    if found["graded"]:
        notes.append(
            f"{_listed(found['graded'])}: the mean of values between 0 and the best one; ± is the sample "
            "standard deviation divided by √n, in brackets Student's 95 % t interval, cut to 0 and 100. "
            "Where all values of a row are 0 or the best one, it is the share of the best, with Wilson's "
            "interval."
        )
    if pooled := [name for name in found["pooled"] if name in found["metrics"]]:
        notes.append(
            f"{_listed(pooled)}: one number of all responses together, in % of its best value; ± is the "
            f"standard deviation of {RESAMPLES} resamples of the problems with a fixed seed, in brackets the "
            "normal 95 % interval with it, cut to 0 and 100."
        )
    if found["scores"]:
        notes.append(
            f"{_listed(found['scores'])}: on a scale without a best value, shown as it is and not in %; ± is "
            "one standard error."
        )
    if found["lower_is_better"]:
        notes.append(f"{_listed(found['lower_is_better'])}: less is better.")
    return notes


def _listed(names: Iterable[str]) -> str:
    return "; ".join(names)


def score_text(value: float, stderr: float) -> str:
    """A number on a scale of its own: `31.4 ± 0.6`."""
    return f"{value:.4g} ± {stderr:.2g}"


def accuracy_text(share: float, stderr: float, interval: Sequence[float], sandbox: str = "") -> str:
    """An accuracy in percent: `75.7 ± 1.2 [73.3, 77.9]`, with ` §` if code ran in a weaker sandbox.

    Args:
        share, stderr, interval: shares (0..1).
        sandbox: see `Measurement`.
    """
    low, high = interval
    mark = " §" if is_weaker(sandbox) else ""
    return f"{share * 100:.1f} ± {stderr * 100:.1f} [{low * 100:.1f}, {high * 100:.1f}]{mark}"


def sandbox_notes(sandboxes: Iterable[str]) -> list[str]:
    """What the mark `§` means, if a measurement of a table has it."""
    return [WEAKER_SANDBOX] if any(map(is_weaker, sandboxes)) else []


def is_weaker(sandbox: str) -> bool:
    """Whether a measurement's code ran in a weaker sandbox."""
    return sandbox in WEAKER


def measured_text(days: Sequence[str], reused: int, samples: int) -> str:
    """When responses were decoded: `2026-11-25`, `2026-11-25 to 2026-11-26 (64 of 128 reused)`."""
    when = " to ".join(days) or "unknown"
    if reused == 0:
        return when
    return f"{when} (reused)" if reused >= samples else f"{when} ({reused} of {samples} reused)"
