"""AUP against the published numbers, and against numbers worked by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from dparallel.evaluation.metrics import accuracy_under_parallelism
from dparallel.reporting.aup import anchor, aup, aup_2
from dparallel.reporting.read import read_benchmark
from tests.dparallel.reporting.made import finished_benchmark

# d3LLM's leaderboard, GSM8K, LLaDA: the model's own accuracy with one token per step, TPF and accuracy.
PUBLISHED = {
    "Fast-dLLM": (74.79, 2.77, 74.68),
    "D2F": (74.98, 2.88, 74.39),
    "dParallel": (74.0, 5.14, 72.63),
    "d3LLM": (74.02, 9.11, 73.1),
}
Y_MAX, Y_MAX_WITH_TAD = 74.98, 80.21


def published(method: str, y_max: float) -> float:
    one_token, tpf, accuracy = PUBLISHED[method]
    return accuracy_under_parallelism([(1, one_token), (tpf, accuracy)], y_max)


@pytest.mark.parametrize(
    ("method", "value"), [("Fast-dLLM", 205.8), ("D2F", 213.8), ("dParallel", 358.1), ("d3LLM", 637.7)]
)
def test_the_published_values(method: str, value: float) -> None:
    assert published(method, Y_MAX) == pytest.approx(value, abs=0.15)


@pytest.mark.parametrize(("method", "value"), [("dParallel", 308.7), ("d3LLM", 539.2)])
def test_a_more_accurate_method_lowers_the_others(method: str, value: float) -> None:
    assert published(method, Y_MAX_WITH_TAD) == pytest.approx(value, abs=0.15)


def test_both_values_of_a_benchmark_by_hand(stage: Path) -> None:
    """Reference: 4 of 5 at TPF 10/12; teacher: 3 of 5 at 10/6; student: 3 of 5 at 10/3."""
    benchmark = read_benchmark("sums", stage)
    reference, teacher, student = benchmark.reported
    assert anchor(benchmark, student) == reference, "the student was not decoded with one token per step"
    found = aup_2([benchmark])
    assert found.y_max == 80
    # 60 < 80 - 5: only the first point counts, 80 * 10/12
    assert found.values["", "student/fast", "entropy"] == pytest.approx(800 / 12)
    assert found.values["", "teacher", "one_token_per_step"] == pytest.approx(800 / 12)
    assert aup([benchmark]).values == {}, "one threshold is no curve"
    # A second one of the student, 3 of 5 at TPF 10/6, y_max 80: 60 * 10/6 + 10/6 * 60 exp(-3 * 0.25)
    wide = student.measurement.decoding.model_copy(update={"threshold": 0.4})
    slower = student.measurement.model_copy(update={"tpf": 10 / 6, "decoding": wide})
    curve = aup(
        [
            replace(
                benchmark,
                rows=[*benchmark.rows, replace(student, split=benchmark.sweep_split, measurement=slower)],
            )
        ]
    )
    assert curve.values == {("", "student/fast", "entropy"): pytest.approx(147.236655)}
    assert teacher.measurement.tpf == pytest.approx(10 / 6)


def test_all_runs_share_the_best_accuracy(stage: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    perfect = finished_benchmark(tmp_path / "runs", tiny_checkpoint, student="11111")
    runs = [read_benchmark("sums", stage, run="a"), read_benchmark("sums", perfect, run="b")]
    assert aup_2(runs).y_max == 100
    # 80 % at TPF 10/12, then 100 % at 10/3: 80 * 10/12 + 1/2 * 30/12 * (100 + 80 * exp(-3 * 0.2))
    assert aup_2(runs).values["b", "student/fast", "entropy"] == pytest.approx(66.66667 + 1.25 * 143.90493)
