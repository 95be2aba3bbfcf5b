"""Compare two methods on the same problems: exact McNemar test, and an interval of the difference."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from dparallel.evaluation.metrics import wilson


@dataclass(frozen=True)
class Paired:
    """How often two methods solve the same problems.

    Attributes:
        both, lost, gained, neither: problems that both solve, that only the first one solves, that only the
            second one solves, and that neither solves.
    """

    both: int
    lost: int
    gained: int
    neither: int

    @classmethod
    def of(cls, verdicts: Iterable[tuple[bool | None, bool | None]]) -> "Paired":
        """Count pairs of verdicts; pairs with an unknown verdict (None) are left out."""
        counts = {(True, True): 0, (True, False): 0, (False, True): 0, (False, False): 0}
        for first, second in verdicts:
            if first is not None and second is not None:
                counts[bool(first), bool(second)] += 1
        return cls(*counts.values())

    @property
    def samples(self) -> int:
        return self.both + self.lost + self.gained + self.neither

    @property
    def difference(self) -> float:
        """Accuracy of the second method minus that of the first, -1..1."""
        return (self.gained - self.lost) / self.samples

    @property
    def p_value(self) -> float:
        """Exact two-sided McNemar test: probability of a split of the discordant pairs as uneven as this.

        If both methods are equally accurate, `lost` is binomial with probability 1/2.
        """
        discordant, fewer = self.lost + self.gained, min(self.lost, self.gained)
        tail = sum(math.comb(discordant, count) for count in range(fewer + 1))
        return min(1.0, 2 * tail / 2**discordant)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of `difference` by Newcombe's method 10 for paired proportions.

        It combines the Wilson intervals of both accuracies with their correlation (Statistics in Medicine 17,
        1998, 2635-2650).
        """
        total = self.samples
        first, second = self.both + self.lost, self.both + self.gained
        low_first, high_first = wilson(first, total)
        low_second, high_second = wilson(second, total)
        below = _reach(second / total - low_second, high_first - first / total, self._correlation)
        above = _reach(high_second - second / total, first / total - low_first, self._correlation)
        return self.difference - below, self.difference + above

    @property
    def _correlation(self) -> float:
        """Newcombe's phi, with his continuity correction; 0 if a margin is empty."""
        first, second, total = self.both + self.lost, self.both + self.gained, self.samples
        margins = first * (total - first) * second * (total - second)
        if margins == 0:
            return 0.0
        concordance = float(self.both * self.neither - self.lost * self.gained)
        if concordance > 0:
            concordance = max(concordance - total / 2, 0)
        return concordance / math.sqrt(margins)


def _reach(one: float, other: float, correlation: float) -> float:
    return math.sqrt(max(one**2 - 2 * correlation * one * other + other**2, 0.0))
