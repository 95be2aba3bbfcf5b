"""Reported metrics, as pure functions."""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

RESAMPLES = 100  # of the problems, for metrics of all responses together, as lm-eval does for BLEU
Z = 1.959963984540054  # 97.5 % quantile of the normal distribution: intervals cover 95 %


def accuracy(flags: Sequence[bool]) -> tuple[float, float]:
    """Share of true flags and its binomial standard error, both 0..1."""
    if not flags:
        raise ValueError("accuracy of no samples is undefined")
    share = sum(flags) / len(flags)
    return share, math.sqrt(share * (1 - share) / len(flags))


def wilson(successes: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion (0..1), which also holds for few samples, and near 0 and 1."""
    share = successes / total
    middle = share + Z**2 / (2 * total)
    reach = Z * math.sqrt(share * (1 - share) / total + Z**2 / (4 * total**2))
    scale = 1 + Z**2 / total
    low, high = (middle - reach) / scale, (middle + reach) / scale
    return (low if successes else 0.0), (high if successes < total else 1.0)  # exact, without rounding


def mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error: the sample standard deviation divided by √n; 0 for one value."""
    if not values:
        raise ValueError("the mean of no samples is undefined")
    average = sum(values) / len(values)
    squares = sum((value - average) ** 2 for value in values)
    return average, math.sqrt(squares / max(len(values) - 1, 1) / len(values))


def t_interval(average: float, stderr: float, count: int) -> tuple[float, float]:
    """95 % interval of a mean by Student's t distribution, cut to 0..1; all of that for one value."""
    if count < 2:
        return 0.0, 1.0
    return _cut(average, float(stdtrit(count - 1, 0.975)) * stderr)


def normal_interval(value: float, stderr: float) -> tuple[float, float]:
    """95 % interval of an estimate with this standard error, cut to 0..1."""
    return _cut(value, Z * stderr)


def _cut(middle: float, reach: float) -> tuple[float, float]:
    return max(middle - reach, 0.0), min(middle + reach, 1.0)


def resampled(whole: Callable[[list[Any]], float], items: Sequence[Any]) -> list[float | None]:
    """`whole` of `RESAMPLES` random selections of the items, with replacement; None where it has no value.

    The selections are those of lm-eval's bootstrap. For as many items they are the same ones, so that the
    values of two models on the same problems are pairs.
    """
    draws = random.Random(0)
    return [number(whole, draws.choices(items, k=len(items))) for _ in range(RESAMPLES)]


def number(whole: Callable[[list[Any]], float], items: list[Any]) -> float | None:
    """`whole` of the items; None if it is not finite, or cannot be computed."""
    try:
        value = float(whole(items))
    except (ArithmeticError, ValueError, LookupError):
        return None
    return value if math.isfinite(value) else None


def spread(values: Iterable[float | None]) -> float:
    """Standard deviation of the values that are known: the standard error by a bootstrap."""
    known = [value for value in values if value is not None]
    return float(np.std(known, ddof=1)) if len(known) > 1 else 0.0


def accuracy_under_parallelism(points: Iterable[tuple[float, float]], best_accuracy: float) -> float:
    """AUP (d3LLM) of the (TPF, accuracy in %) points of a method.

    The area under accuracy over TPF. Points that are more than 5 percentage points worse than the slowest one
    are excluded; the others have the weight exp(-3 (1 - accuracy / best_accuracy)), at most 1.

    Args:
        best_accuracy: the best accuracy, in %, of any method on the same problems.
    """
    ordered = sorted(points)
    if not ordered or best_accuracy == 0:
        return 0.0
    slowest_tpf, slowest_accuracy = ordered[0]
    kept = [(tpf, percent) for tpf, percent in ordered if percent >= slowest_accuracy - 5]
    weighted = [percent * min(math.exp(-3 * (1 - percent / best_accuracy)), 1) for _, percent in kept]
    area = slowest_tpf * slowest_accuracy
    for index in range(1, len(kept)):
        width = kept[index][0] - kept[index - 1][0]
        area += width * (weighted[index] + weighted[index - 1]) / 2
    return area
