import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dparallel.evaluation.metrics import wilson
from dparallel.reporting.paired import Paired

counts = st.integers(0, 60)


def test_mcnemar_by_hand() -> None:
    # 2 against 12: 2 (C(14,0) + C(14,1) + C(14,2)) / 2**14 = 2 * 106 / 16384 = 0.012939
    assert Paired(36, 12, 2, 0).p_value == pytest.approx(212 / 16384)
    # 0 against 5: 2 / 2**5
    assert Paired(10, 0, 5, 3).p_value == pytest.approx(1 / 16)
    # 1 against 1: everything is at least as uneven
    assert Paired(10, 1, 1, 0).p_value == 1
    assert Paired(10, 0, 0, 4).p_value == 1


def test_interval_of_the_published_example() -> None:
    """Newcombe 1998, method 10 for 36, 12, 2, 0: a difference of 0.2 between 0.0569 and 0.3404."""
    found = Paired(36, 2, 12, 0)
    assert found.difference == pytest.approx(0.2)
    assert found.interval == pytest.approx((0.0569, 0.3404), abs=5e-5)


def test_interval_by_hand() -> None:
    # 4 both, 1 lost, 0 gained, 0 neither: accuracies 1 and 0.8, of which one margin is empty, so phi = 0.
    # Wilson's limits with z**2 = 3.841459: of 1 from 1 / (1 + z**2/5) = 0.565518 to 1; of 0.8 the middle is
    # 1.184146 / 1.768292 = 0.669655 and the reach 1.959964 * sqrt(0.16/5 + z**2/100) / 1.768292 = 0.294129,
    # so from 0.375526 to 0.963784. Below: sqrt(0.424474**2 + 0**2); above: sqrt(0.163784**2 + 0.434482**2).
    low, high = Paired(4, 1, 0, 0).interval
    assert low == pytest.approx(-0.2 - 0.424474, abs=1e-5)
    assert high == pytest.approx(-0.2 + math.hypot(0.163784, 0.434482), abs=1e-5)


def test_wilson_by_hand() -> None:
    # 0 of 10: from 0 to z**2 / (10 + z**2) = 3.841459 / 13.841459
    assert wilson(0, 10) == pytest.approx((0, 0.277533), abs=1e-6)


def test_unknown_verdicts_are_left_out() -> None:
    found = Paired.of([(True, False), (None, True), (False, None), (False, False), (True, True)])
    assert found == Paired(both=1, lost=1, gained=0, neither=1)


@given(counts, counts, counts, counts)
def test_the_other_direction_is_the_mirror_image(both: int, lost: int, gained: int, neither: int) -> None:
    assume(both + lost + gained + neither > 0)
    one, other = Paired(both, lost, gained, neither), Paired(both, gained, lost, neither)
    low, high = one.interval
    assert other.interval == pytest.approx((-high, -low), abs=1e-12)
    assert one.p_value == other.p_value
    assert 0 < one.p_value <= 1
    assert -1 - 1e-12 <= low <= one.difference + 1e-12
    assert one.difference - 1e-12 <= high <= 1 + 1e-12
