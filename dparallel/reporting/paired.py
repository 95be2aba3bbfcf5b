"""Compare two methods on the same problems: a paired test, and an interval of the difference.

What is tested follows from what a verdict is: right or wrong (`Paired`), a value between (`PairedMeans`), or
one number of all responses together (`PairedResamples`).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.special import stdtrit

from dparallel.evaluation.metrics import Z, mean, spread, wilson

EXACT = 12  # differing problems for which all assignments of signs are tried, 4,096
ASSIGNMENTS = 9_999  # random ones of more problems
CHUNK = 500  # of them at once


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
    test = "mcnemar"

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


@dataclass(frozen=True)
class PairedMeans:
    """The differences of the values that two methods have on the same problems.

    Attributes:
        differences: value of the second method minus that of the first, -1..1, by problem.
    """

    differences: tuple[float, ...]
    test = "sign_flip"

    @classmethod
    def of(cls, values: Iterable[tuple[float | None, float | None]]) -> "PairedMeans":
        """From pairs of values; pairs with an unknown value (None) are left out."""
        return cls(
            tuple(
                float(second) - float(first)
                for first, second in values
                if first is not None and second is not None
            )
        )

    @property
    def samples(self) -> int:
        return len(self.differences)

    @property
    def lost(self) -> int:
        """Problems on which the second method has a lower value."""
        return sum(difference < 0 for difference in self.differences)

    @property
    def gained(self) -> int:
        """Problems on which the second method has a higher value."""
        return sum(difference > 0 for difference in self.differences)

    @property
    def difference(self) -> float:
        """Mean of the second method minus that of the first, -1..1."""
        return mean(self.differences)[0]

    @property
    def stderr(self) -> float:
        """Standard error of `difference`."""
        return mean(self.differences)[1]

    @property
    def p_value(self) -> float:
        """Two-sided test by random signs: how often the sum of the differences is as far from 0 as this.

        If the methods do not differ, each difference may as well have the other sign. All assignments of
        signs are tried for up to `EXACT` problems that differ, otherwise `ASSIGNMENTS` random ones with a
        fixed seed. For verdicts of right or wrong, the exact test is McNemar's.
        """
        differing = np.array([difference for difference in self.differences if difference])
        limit = abs(differing.sum()) - 1e-9
        if not len(differing):
            return 1.0
        if len(differing) <= EXACT:
            signs = np.array(list(product((1, -1), repeat=len(differing))))
            return float(np.mean(np.abs(signs @ differing) >= limit))
        draws, extreme = np.random.default_rng(0), 0
        for first in range(0, ASSIGNMENTS, CHUNK):
            count = min(CHUNK, ASSIGNMENTS - first)
            signs = draws.integers(0, 2, (count, len(differing))) * 2 - 1
            extreme += int(np.sum(np.abs(signs @ differing) >= limit))
        return (extreme + 1) / (ASSIGNMENTS + 1)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of `difference` by Student's t distribution, cut to -1..1."""
        if self.samples < 2:
            return -1.0, 1.0
        return _cut(self.difference, float(stdtrit(self.samples - 1, 0.975)) * self.stderr)


@dataclass(frozen=True)
class PairedResamples:
    """Two numbers of all responses together, and those of the same random selections of the problems.

    Attributes:
        samples: number of problems.
        first, second: the numbers (0..1) of the methods.
        resamples: their differences, second minus first, in every selection of which both are known.
    """

    samples: int
    first: float
    second: float
    resamples: tuple[float, ...]
    test = "bootstrap"

    @classmethod
    def of(
        cls, samples: int, numbers: tuple[float, float], resamples: Iterable[Sequence[float | None]]
    ) -> "PairedResamples":
        """From the numbers, and pairs of those of the same selection."""
        known = [second - first for first, second in resamples if first is not None and second is not None]
        return cls(samples, *numbers, tuple(known))

    @property
    def difference(self) -> float:
        return self.second - self.first

    @property
    def stderr(self) -> float:
        """Standard error of `difference`."""
        return spread(self.resamples)

    @property
    def p_value(self) -> float:
        """Two-sided: twice the share of selections whose difference is 0 or has the other sign."""
        below = sum(difference <= 0 for difference in self.resamples)
        above = sum(difference >= 0 for difference in self.resamples)
        return min(1.0, 2 * (min(below, above) + 1) / (len(self.resamples) + 1))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of `difference` by the normal distribution, cut to -1..1."""
        return _cut(self.difference, Z * self.stderr) if self.resamples else (-1.0, 1.0)


def paired_values(
    values: Sequence[tuple[bool | float | None, bool | float | None]],
) -> Paired | PairedMeans:
    """Compare pairs of verdicts: right or wrong, or values between."""
    if any(value not in (None, 0, 1) for pair in values for value in pair):
        return PairedMeans.of(values)
    return Paired.of((_flag(one), _flag(other)) for one, other in values)


def _flag(value: bool | float | None) -> bool | None:
    return None if value is None else bool(value)


def _cut(middle: float, reach: float) -> tuple[float, float]:
    return max(middle - reach, -1.0), min(middle + reach, 1.0)
