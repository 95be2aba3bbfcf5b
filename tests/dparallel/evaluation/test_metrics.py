import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dparallel.decoding.canvas import tokens_per_forward
from dparallel.evaluation.metrics import accuracy, accuracy_under_parallelism

points = st.lists(st.tuples(st.floats(0.5, 20), st.floats(1, 100)), min_size=1, max_size=8)


def test_accuracy_and_its_binomial_standard_error() -> None:
    share, stderr = accuracy([True, True, True, False])
    assert share == 0.75
    assert stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 4))  # 0.2165


def test_accuracy_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        accuracy([])


@given(st.lists(st.booleans(), min_size=1))
def test_standard_error_is_zero_only_without_spread(flags: list[bool]) -> None:
    share, stderr = accuracy(flags)
    assert (stderr == 0) == (share in (0, 1))
    assert stderr <= 0.5 / math.sqrt(len(flags)) + 1e-12


def test_tpf_is_a_ratio_of_sums_not_a_mean_of_ratios() -> None:
    # 30 tokens in 10 forwards and 10 tokens in 10: 40 / 20, where the mean of ratios is also 2;
    # 30 in 5 and 10 in 10: 40 / 15 = 2.667, where the mean of ratios is 3.5.
    assert tokens_per_forward([30, 10], [5, 10]) == pytest.approx(8 / 3)


def test_aup_by_hand() -> None:
    # y_max = 80. W(80) = 1, W(78) = exp(-3 * 2/80) = exp(-0.075) = 0.927743.
    # 74 < 80 - 5 is left out.
    # 1 * 80 + 1/2 * (3 - 1) * (78 * 0.927743 + 80 * 1) = 80 + 152.36399 = 232.36399
    area = accuracy_under_parallelism([(3, 78), (5, 74), (1, 80)], best_accuracy=80)
    assert area == pytest.approx(232.36399, abs=1e-3)


def test_aup_weighs_against_the_best_of_any_method() -> None:
    # One point has no area beyond its rectangle, whatever the best is.
    assert accuracy_under_parallelism([(2, 70)], best_accuracy=90) == 140
    # exp(-3 * (1 - 70/90)) = exp(-2/3) = 0.513417; 140 + 1/2 * 1 * (70 + 70) * 0.513417 = 175.93919
    area = accuracy_under_parallelism([(2, 70), (3, 70)], best_accuracy=90)
    assert area == pytest.approx(175.93919, abs=1e-3)


def test_aup_of_equal_accuracy_is_accuracy_times_the_highest_tpf() -> None:
    assert accuracy_under_parallelism([(1, 50), (2, 50), (4, 50)], best_accuracy=50) == pytest.approx(200)


def test_aup_without_any_right_answer_is_zero() -> None:
    assert accuracy_under_parallelism([(1, 0), (2, 0)], best_accuracy=0) == 0


@given(points, st.randoms())
def test_aup_does_not_depend_on_the_order_of_points(some: list[tuple[float, float]], rng) -> None:
    best = max(percent for _, percent in some)
    shuffled = rng.sample(some, len(some))
    assert accuracy_under_parallelism(shuffled, best) == pytest.approx(accuracy_under_parallelism(some, best))


@given(points)
def test_aup_is_at_most_the_rectangle_of_best_accuracy_and_highest_tpf(some) -> None:
    best = max(percent for _, percent in some)
    fastest = max(tpf for tpf, _ in some)
    assert accuracy_under_parallelism(some, best) <= best * fastest + 1e-6
