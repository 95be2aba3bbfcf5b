"""AUP (accuracy under parallelism, d3LLM) of the methods of a benchmark, over the rows of all its runs.

AUP is relative: the best accuracy y_max of any method takes part in the value of every method, so values
compare only if they have the same y_max, which is always stated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dparallel.evaluation.cases import BASELINE
from dparallel.evaluation.metrics import accuracy_under_parallelism
from dparallel.evaluation.selection import Row
from dparallel.reporting.read import Benchmark

Group = tuple[str, str, str]  # run, model, method
MEANING = (
    "AUP (accuracy under parallelism) is the area under accuracy (in %) over TPF; accuracies below the best "
    "one of any method, y_max, weigh less, and those more than 5 points below the curve's first point do not "
    "count."
)


@dataclass(frozen=True)
class Aup:
    """AUP values and what they are relative to.

    Attributes:
        y_max: best accuracy, in %, of any method.
        values: by run, model and method.
    """

    y_max: float
    values: dict[Group, float]


def aup_2(benchmarks: Sequence[Benchmark]) -> Aup:
    """AUP over two points, as in published tables: one token per step, and the row of the table.

    The first point is the model's own with one token per step if it was measured, otherwise the teacher's.
    """
    rows = [row for benchmark in benchmarks for row in benchmark.reported]
    y_max = max(map(_percent, rows))
    values = {}
    for benchmark in benchmarks:
        for row in benchmark.reported:
            points = {_point(anchor(benchmark, row)), _point(row)}
            values[benchmark.run, row.model, row.method] = accuracy_under_parallelism(points, y_max)
    return Aup(y_max, values)


def anchor(benchmark: Benchmark, row: Row) -> Row:
    """The row with one token per step that begins the curve of `row`."""
    if row.model.startswith(BASELINE):  # another model; autoregressive ones commit one token per step
        return row
    own = [other for other in benchmark.reported if other.model == row.model and _one_token_per_step(other)]
    return own[0] if own else benchmark.reference


def aup(benchmarks: Sequence[Benchmark]) -> Aup:
    """AUP over all thresholds of each sweep, on the split on which whole sweeps were measured.

    A sweep of one threshold has none: the area under one point takes nothing off for a loss of accuracy.

    Args:
        benchmarks: runs of a benchmark with the same `sweep_split`.
    """
    rows = [(found, row) for found in benchmarks for row in found.rows if row.split == found.sweep_split]
    y_max = max(_percent(row) for _, row in rows)
    points: dict[Group, list[tuple[float, float]]] = {}
    for benchmark, row in rows:
        if (row.model, row.method) in benchmark.swept:
            points.setdefault((benchmark.run, row.model, row.method), []).append(_point(row))
    curves = {group: curve for group, curve in points.items() if len(curve) > 1}
    return Aup(y_max, {group: accuracy_under_parallelism(curve, y_max) for group, curve in curves.items()})


def _one_token_per_step(row: Row) -> bool:
    decoding = row.measurement.decoding
    return decoding.steps == decoding.gen_length


def _percent(row: Row) -> float:
    return row.measurement.accuracy * 100


def _point(row: Row) -> tuple[float, float]:
    return row.measurement.tpf, _percent(row)
