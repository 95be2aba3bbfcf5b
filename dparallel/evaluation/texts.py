"""Cells that all tables of measurements have in common."""

from collections.abc import Sequence

INTERVAL = (
    "± is one standard error; in brackets Wilson's 95 % interval, which also holds for few problems (n)."
)
MEASURED = (
    "Measured: the days (UTC) on which the responses were decoded. Reused ones were stored before the run "
    "asked for them, so that their times are those of an earlier run."
)


def accuracy_text(share: float, stderr: float, interval: Sequence[float]) -> str:
    """An accuracy in percent: `75.7 ± 1.2 [73.3, 77.9]`; all arguments are shares (0..1)."""
    low, high = interval
    return f"{share * 100:.1f} ± {stderr * 100:.1f} [{low * 100:.1f}, {high * 100:.1f}]"


def measured_text(days: Sequence[str], reused: int, samples: int) -> str:
    """When responses were decoded: `2026-11-25`, `2026-11-25 to 2026-11-26 (64 of 128 reused)`."""
    when = " to ".join(days) or "unknown"
    if reused == 0:
        return when
    return f"{when} (reused)" if reused >= samples else f"{when} ({reused} of {samples} reused)"
