"""Reported metrics, as pure functions."""

import math
from collections.abc import Iterable, Sequence

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
