import pytest

from dparallel.config.decoding import DecodingConfig
from dparallel.evaluation.measure import Measurement
from dparallel.evaluation.metrics import accuracy_under_parallelism
from dparallel.evaluation.report import Results, table
from dparallel.evaluation.selection import (
    Row,
    aup_by_sweep,
    default_student,
    headline,
    keeps_accuracy,
    operating_point,
    slower,
)


def row(model: str, method: str, threshold: float | None, accuracy: float, tpf: float, **changes) -> Row:
    decoding = (
        DecodingConfig(gen_length=36, block_length=12, rule="steps", steps=36)
        if threshold is None
        else DecodingConfig(gen_length=36, block_length=12, threshold=threshold)
    )
    measurement = Measurement(
        decoding=decoding,
        samples=1000,
        accuracy=accuracy,
        accuracy_stderr=0.005,
        answer_accuracy=None,
        nfe=30 / tpf,
        tpf=tpf,
        tps=100 * tpf,
        latency=0.3 / tpf,
        batch_size=64,
        hardware="a machine",
    )
    return Row(model, method, "test", measurement, **changes)


REFERENCE = row("teacher", "one_token_per_step", None, 0.98, 1.0)
SWEEP = [
    row("student/a", "entropy", 0.1, 0.985, 3.0),
    row("student/a", "entropy", 0.5, 0.970, 4.0),  # exactly at the limit of one point
    row("student/a", "entropy", 0.8, 0.969, 5.0),
]


def test_the_operating_point_is_the_fastest_that_keeps_the_accuracy() -> None:
    assert [keeps_accuracy(each, REFERENCE, 0.01) for each in SWEEP] == [True, True, False]
    chosen = operating_point(SWEEP, REFERENCE, max_loss=0.01)
    assert (chosen.threshold, chosen.operating_point, chosen.qualifies) == (0.5, True, True)
    assert operating_point(SWEEP, REFERENCE, max_loss=0.02).threshold == 0.8


def test_slower_rows_come_fastest_first_and_without_the_point() -> None:
    assert slower(SWEEP[2], [SWEEP[0], SWEEP[2], SWEEP[1]]) == [SWEEP[1], SWEEP[0]]
    assert slower(SWEEP[0], SWEEP) == []


def test_where_none_keeps_the_accuracy_the_most_accurate_is_flagged() -> None:
    chosen = operating_point(SWEEP[1:], REFERENCE, max_loss=0.001)
    assert (chosen.threshold, chosen.operating_point, chosen.qualifies) == (0.5, True, False)


def test_the_default_student_is_the_fastest_that_qualifies() -> None:
    teacher = row("teacher", "entropy", 0.5, 0.99, 9.0)
    slow, fast = row("student/a", "entropy", 0.5, 0.98, 3.0), row("student/b", "entropy", 0.5, 0.97, 4.0)
    reckless = row("student/c", "entropy", 0.5, 0.50, 8.0, qualifies=False)
    assert default_student([teacher, slow, fast, reckless]) is fast
    careful = row("student/d", "entropy", 0.1, 0.60, 2.0, qualifies=False)
    assert default_student([teacher, reckless, careful]) is careful


def test_the_headline_compares_with_the_teachers_best_at_equal_accuracy() -> None:
    teacher = [
        row("teacher", "few_step", None, 0.60, 4.0),  # fast but wrong
        row("teacher", "confidence", 0.9, 0.98, 2.0),
        row("teacher", "entropy", 0.5, 0.975, 2.5),
    ]
    found = headline(row("student/a", "entropy", 0.5, 0.972, 5.0), REFERENCE, teacher, max_loss=0.01)
    assert found.teacher_best is teacher[2]
    assert found.accuracy_loss == pytest.approx(0.008)
    assert found.keeps_accuracy
    assert (found.nfe_ratio, found.tpf_ratio) == (pytest.approx(5), pytest.approx(5))
    assert found.tpf_ratio_to_teacher_best == pytest.approx(2)
    assert found.nfe_ratio_to_teacher_best == pytest.approx(2)
    assert found.numbers()["keeps_accuracy"] == 1.0


def test_without_a_fast_teacher_the_reference_is_its_best() -> None:
    found = headline(SWEEP[0], REFERENCE, [row("teacher", "few_step", None, 0.6, 4.0)], max_loss=0.01)
    assert found.teacher_best is REFERENCE


def test_aup_takes_the_swept_methods_and_the_best_accuracy_of_all() -> None:
    found = aup_by_sweep([REFERENCE, *SWEEP[:2], row("student/b", "entropy", 0.5, 0.9, 2.0)], {"entropy"})
    assert found == {
        ("student/a", "entropy"): pytest.approx(accuracy_under_parallelism([(3, 98.5), (4, 97)], 98.5)),
        ("student/b", "entropy"): pytest.approx(180),
    }


def test_the_table_shows_every_reported_row_and_says_what_it_is() -> None:
    student = row("student/a_b", "entropy", 0.5, 0.972, 5.0, operating_point=True, qualifies=False)
    results = Results(
        rows=[REFERENCE, student],
        reference=REFERENCE,
        chosen=[student],
        reported=[REFERENCE, student],
        aup={("student/a_b", "entropy"): 123.0},
        sweep_split="validation",
        default_student=student,
        headline=headline(student, REFERENCE, [REFERENCE], 0.01),
    )
    lines = table(results).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:4]]
    assert cells[0][:5] == ["model", "method", "threshold", "solution %", "answer %"]
    assert cells[0][5:] == ["NFE", "TPF", "TPS", "latency s (batch 1)", "samples"]
    assert cells[2] == [
        *("teacher", "one token per step", "", "98.0 ± 0.5", ""),
        *("30.0", "1.00", "100", "0.3", "1000"),
    ]
    assert cells[3] == [
        *("a b", "entropy (default) †", "0.5", "97.2 ± 0.5", ""),
        *("6.0", "5.00", "500", "0.06", "1000"),
    ]
    notes = "\n".join(lines[4:])
    for part in ("a machine", "batch size 64", "-0.8 points", "5.00 times fewer forwards", "† no threshold"):
        assert part in notes

    metrics = results.as_metrics()
    assert metrics["teacher/one_token_per_step/tpf"] == 1.0
    assert metrics["student/a_b/entropy/threshold"] == 0.5
    assert metrics["student/a_b/entropy/aup"] == 123.0
    assert metrics["headline/nfe_ratio"] == pytest.approx(5)
    assert all(isinstance(value, float) for value in metrics.values())


@pytest.mark.parametrize(
    ("accuracy", "points"), [(0.98, "+0.0"), (0.9799, "+0.0"), (0.986, "+0.6"), (0.97, "-1.0")]
)
def test_equal_accuracy_is_no_negative_difference(accuracy: float, points: str) -> None:
    student = row("student/a", "entropy", 0.5, accuracy, 5.0, operating_point=True)
    results = Results(
        rows=[REFERENCE, student],
        reference=REFERENCE,
        chosen=[student],
        reported=[REFERENCE, student],
        aup={},
        sweep_split="validation",
        default_student=student,
        headline=headline(student, REFERENCE, [], 0.01),
    )
    assert f"accuracy is {points} points from" in table(results)
