import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dparallel.evaluation.metrics import wilson
from dparallel.reporting.paired import Paired, PairedMeans, PairedResamples

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


def test_random_signs_by_hand() -> None:
    """Differences 0.5, 0.25, 0 and -0.25: the sum 0.5; of the 8 signs of three, |sum| is at least 0.5 in
    +++: 0.5, ++-: 1, +-+: 0, +--: 0.5, and their mirror images, so in 6 of 8."""
    found = PairedMeans.of([(0.5, 1.0), (0.0, 0.25), (1, 1), (0.75, 0.5), (None, 1.0), (1.0, None)])
    assert (found.samples, found.lost, found.gained) == (4, 1, 2)
    assert found.difference == pytest.approx(0.125)
    assert found.p_value == pytest.approx(6 / 8)
    # squares of the deviations 0.375, 0.125, -0.125, -0.375 add up to 0.3125: s.e. sqrt(0.3125 / 3 / 4)
    assert found.stderr == pytest.approx(0.161374, abs=1e-6)
    low, high = found.interval  # t of 3 degrees of freedom: 3.182446
    assert (low, high) == pytest.approx((0.125 - 0.513566, 0.125 + 0.513566), abs=1e-5)


def test_many_differences_are_tested_by_chance_with_a_fixed_seed() -> None:
    one = PairedMeans((0.1,) * 30 + (-0.1,) * 10)
    assert one.p_value == one.p_value
    # 30 against 10 of equal size is McNemar's 2 P(X <= 10 of 40) = 0.002222
    assert one.p_value == pytest.approx(Paired(0, 10, 30, 0).p_value, abs=0.002)
    assert PairedMeans((0.0,) * 5).p_value == 1
    assert PairedMeans((0.3,)).interval == (-1, 1)


@given(st.integers(0, 6), st.integers(0, 6), st.integers(1, 5))
def test_random_signs_of_right_and_wrong_are_mcnemars_test(lost: int, gained: int, both: int) -> None:
    pairs = [(True, False)] * lost + [(False, True)] * gained + [(True, True)] * both
    one, other = Paired.of(pairs), PairedMeans.of(pairs)
    assert other.p_value == pytest.approx(one.p_value)
    assert (other.lost, other.gained, other.samples) == (one.lost, one.gained, one.samples)
    assert other.difference == pytest.approx(one.difference)


def test_resamples_by_hand() -> None:
    """Differences 0.1, 0.2 and -0.1, of which one is not above 0: p = 2 (1 + 1) / (3 + 1)."""
    found = PairedResamples.of(8, (0.3, 0.4), [(0.3, 0.4), (0.2, 0.4), (0.4, 0.3), (None, 0.4)])
    assert found.difference == pytest.approx(0.1)
    assert found.p_value == 1
    assert found.stderr == pytest.approx(0.152753, abs=1e-6)
    low, high = found.interval
    assert (low, high) == pytest.approx((0.1 - 0.299390, 0.1 + 0.299390), abs=1e-5)
    sure = PairedResamples.of(8, (0.1, 0.4), [(0.1, 0.4)] * 100)
    assert sure.p_value == pytest.approx(2 / 101)
