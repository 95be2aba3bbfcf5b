import pytest

from dparallel.config.decoding import DecodingConfig
from dparallel.evaluation.measure import Measurement
from dparallel.evaluation.metrics import accuracy_under_parallelism
from dparallel.evaluation.selection import (
    Row,
    aup_by_sweep,
    best_student,
    headline,
    keeping_students,
    keeps_accuracy,
    mark,
    operating_point,
    operating_points,
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
        metrics={"solution": accuracy},
        nfe=30 / tpf,
        tpf=tpf,
        tps=100 * tpf,
        latency=0.3 / tpf,
        batch_sizes=(64,),
        hardware="a machine",
        measured_on=("2026-11-25",),
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


def test_every_swept_model_and_method_has_an_operating_point() -> None:
    other = row("student/b", "entropy", 0.1, 0.5, 9.0)
    rows = [REFERENCE, row("teacher", "few_step", None, 0.99, 9.0), *SWEEP, other]
    points = operating_points(rows, [each.case for each in [*SWEEP, other]], max_loss=0.01)
    assert [(point.model, point.threshold, point.qualifies) for point in points] == [
        ("student/a", 0.5, True),
        ("student/b", 0.1, False),
    ]
    marked = mark(rows, points)
    assert [each.operating_point for each in marked] == [False, False, False, True, False, True]
    assert [each.qualifies for each in marked] == [True] * 5 + [False]


def test_the_best_student_is_the_fastest_that_qualifies() -> None:
    teacher = row("teacher", "entropy", 0.5, 0.99, 9.0)
    slow, fast = row("student/a", "entropy", 0.5, 0.98, 3.0), row("student/b", "entropy", 0.5, 0.97, 4.0)
    reckless = row("student/c", "entropy", 0.5, 0.50, 8.0, qualifies=False)
    assert best_student([teacher, slow, fast, reckless]) is fast
    careful = row("student/d", "entropy", 0.1, 0.60, 2.0, qualifies=False)
    assert best_student([teacher, reckless, careful]) is careful


def test_students_that_keep_the_accuracy_do_so_on_both_splits() -> None:
    test = [
        REFERENCE,
        row("teacher", "entropy", 0.5, 0.98, 2.0, operating_point=True),
        row("student/a", "entropy", 0.5, 0.98, 2.0, operating_point=True),
        row("student/a", "confidence", 0.5, 0.98, 2.0, operating_point=True),
        row("student/misses_on_test", "entropy", 0.5, 0.96, 2.0, operating_point=True),
        row("student/missed_on_validation", "entropy", 0.5, 0.99, 2.0, operating_point=True, qualifies=False),
        row("student/was_not_chosen", "entropy", 0.5, 0.99, 2.0),
    ]
    assert keeping_students(test, REFERENCE, 0.01) == ["student/a"]


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
        ("student/b", "entropy"): None,
    }


def test_no_speed_makes_up_for_lost_accuracy() -> None:
    """A student that loses all accuracy has a loss and no ratios."""
    wrong = row("student/a", "entropy", 0.5, 0.0, 9.0, operating_point=True, qualifies=False)
    numbers = headline(wrong, REFERENCE, [], max_loss=0.01).numbers()
    assert numbers == {"accuracy_loss": pytest.approx(0.98), "keeps_accuracy": 0.0}
