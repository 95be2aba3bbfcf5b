"""Cells that all tables of measurements have in common."""

from collections.abc import Iterable, Sequence

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
