"""Results of the decoding benchmark: rows, table and targets."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.common.tables import markdown


@dataclass(frozen=True)
class Result:
    """A row of the table, as numbers.

    Attributes:
        exact: whether tokens must equal the oracle's (in float32).
        seconds: of each round.
        tokens: decoded tokens, including the first end token.
        tokens_per_second, ratio: medians over rounds; the ratio compares with the oracle in the same round.
        nfe: forward passes per response.
        forwards: calls of the model, of any batch size.
        ms, limit_ms, memory_ms: per call: measured, at the device's limits, and for its bytes only.
        compute_bound: whether FLOPs are the limit, not bytes.
        peak_bytes: None on a CPU, whose allocator has no statistics.
        differing: share of the reference's tokens, up to its end, that differ.
        accuracy, accuracy_stderr: share of valid solutions, 0..1; None for random weights.
    """

    name: str
    dtype: str
    batch_size: int
    exact: bool
    compiled: bool
    decoding: dict[str, Any]
    seconds: list[float]
    tokens: int
    tokens_per_second: float
    ratio: float
    nfe: float
    forwards: int
    ms: float
    limit_ms: float
    memory_ms: float
    compute_bound: bool
    peak_bytes: int | None
    differing: float
    accuracy: float | None
    accuracy_stderr: float | None

    @property
    def of_limit(self) -> float:
        """Time of a call at the device's limits divided by its actual time."""
        return self.limit_ms / self.ms

    @property
    def limit_ratio(self) -> float:
        """The ratio to the oracle that would be reached at the device's limits."""
        return self.ratio / self.of_limit

    @property
    def bound(self) -> str:
        return "compute" if self.compute_bound else "memory"

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"of_limit": self.of_limit, "limit_ratio": self.limit_ratio}


def _solutions(result: Result) -> str:
    if result.accuracy is None or result.accuracy_stderr is None:
        return ""
    return f"{100 * result.accuracy:.1f} ± {100 * result.accuracy_stderr:.1f}"


COLUMNS: dict[str, Callable[[Result], str]] = {
    "decoding": lambda row: row.name if row.exact else f"≈ {row.name}",  # what may change tokens
    "dtype": lambda row: row.dtype,
    "compiled": lambda row: "yes" if row.compiled else "",
    "batch": lambda row: str(row.batch_size),
    "tokens/s": lambda row: f"{row.tokens_per_second:.0f}",
    "times the oracle": lambda row: f"{row.ratio:.2f}",
    "NFE": lambda row: f"{row.nfe:.1f}",
    "ms/forward": lambda row: f"{row.ms:.2f}",
    "of the limit": lambda row: f"{row.of_limit:.0%}",
    "bound by": lambda row: row.bound,
    "peak GiB": lambda row: "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.1f}",
    "tokens": lambda row: "equal" if row.differing == 0 else f"{row.differing:.2%} differ",
    "solutions %": _solutions,
}
TEXTS = ("decoding", "dtype", "compiled", "bound by", "tokens")


@dataclass(frozen=True)
class Mark:
    """A target for `measured`, and what limits it."""

    what: str
    measured: float
    sign: Literal[">=", "<="]
    wanted: float
    holds: str

    @property
    def met(self) -> bool:
        return self.measured >= self.wanted if self.sign == ">=" else self.measured <= self.wanted


def marks_table(marks: Sequence[Mark]) -> str:
    """A Markdown table of targets."""
    rows = [
        [
            mark.what,
            f"{mark.sign} {mark.wanted:g}",
            f"{mark.measured:.2f}",
            "yes" if mark.met else "no",
            mark.holds,
        ]
        for mark in marks
    ]
    titles = ["mark", "wanted", "measured", "met", "what holds it"]
    return markdown(titles, rows, texts=titles)


def cpu_marks(results: Sequence[Result]) -> list[Mark]:
    """Targets of exact decoding of the tiny teacher in float32, compared with the oracle."""
    marks = []
    for size, wanted in ((1, 3.0), (32, 10.0)):
        rows = [
            result
            for result in results
            if result.exact and result.batch_size == size and result.dtype == "float32"
        ]
        if rows:
            best = max(rows, key=lambda row: row.ratio)
            holds = (
                f"{best.ms:.2f} ms per forward, {best.limit_ms:.2f} at the limit ({best.bound}), "
                f"which allows {best.limit_ratio:.1f} times the oracle"
            )
            marks.append(Mark(f"exact, batch {size}: times the oracle", best.ratio, ">=", wanted, holds))
    return marks


def gpu_marks(results: Sequence[Result]) -> list[Mark]:
    """Targets of the dual cache in bf16 at the 8B shape: close to the memory bandwidth; gain by batching."""
    dual = [result for result in results if result.dtype == "bfloat16" and result.decoding["cache"] == "dual"]
    dual = [result for result in dual if result.decoding["mode"] == "sequential"]
    if not dual:
        return []
    alone = max(
        (result for result in dual if result.batch_size == 1), key=lambda result: result.tokens_per_second
    )
    holds = (
        f"{alone.ms:.2f} ms per forward, {alone.memory_ms:.2f} for its bytes; "
        f"{alone.limit_ms:.2f} at the limit, with the FLOPs of the forwards over the whole canvas"
    )
    what = "dual cache, batch 1: times the bandwidth's time per forward"
    marks = [Mark(what, alone.ms / alone.memory_ms, "<=", 1.5, holds)]
    for batch in (result for result in dual if result.batch_size == 16):
        gain = batch.tokens_per_second / alone.tokens_per_second
        allowed = gain / batch.of_limit * alone.of_limit
        holds = f"batch 16 is bound by {batch.bound}; with both at the limit {allowed:.1f} times"
        marks.append(Mark("dual cache, batch 16: times batch 1's tokens/s", gain, ">=", 6.0, holds))
    return marks
