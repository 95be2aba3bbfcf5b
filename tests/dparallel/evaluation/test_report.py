from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from dparallel.config.experiment import BenchmarkConfig
from dparallel.evaluation.report import Results, forwards, table
from dparallel.evaluation.selection import Row, mark
from tests.dparallel.evaluation.test_selection import REFERENCE, row

COINS = {"benchmark": "coins", "count": 2}
SHAPE = {"gen_length": 36, "block_length": 12}
CONFIG = BenchmarkConfig.model_validate(
    {
        "test": {**COINS, "split": "test"},
        "validation": {**COINS, "split": "validation"},
        "reference": {**SHAPE, "rule": "steps", "steps": 36},
        "sweeps": {"entropy": {"decoding": SHAPE, "thresholds": [0.5]}},
        "teacher_sweeps": ["entropy"],
        "student_sweeps": ["entropy"],
    }
)


def results(points: Sequence[Row], test: Sequence[Row], reference: Row = REFERENCE) -> Results:
    """Results with students only; the first is the best."""
    validation = mark([reference, *points], points)
    return Results.of(CONFIG, validation, mark([reference, *test], points), points, points[0].case)


def student(accuracy: float, tpf: float = 5.0, **changes: Any) -> Row:
    return row("student/a_b", "entropy", 0.5, accuracy, tpf, operating_point=True, **changes)


def cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_teacher_that_solves_nothing_has_no_default_student() -> None:
    """Not even one that keeps this accuracy, and is slower."""
    nothing = row("teacher", "one_token_per_step", None, 0.0, 1.0)
    found = results([student(0.0, tpf=0.8)], [student(0.0, tpf=0.8)], nothing)
    assert "the teacher solves none of the 1,000 test problems, so there is no accuracy to keep" in table(
        found
    )
    assert found.as_json()["default_student"] is None


def test_more_forwards_are_called_more() -> None:
    assert forwards(3.0) == "3.00 times fewer forwards"
    assert forwards(0.8) == "1.25 times more forwards"


def test_the_table_shows_every_reported_row_and_says_what_it_is() -> None:
    found = results([student(0.972)], [student(0.972)])
    title, _, reference, best = cells(table(found))
    assert title[:4] == ["model", "method", "threshold", "solution %"]
    assert title[4:] == ["n", "NFE", "TPF", "TPS", "latency s (batch 1)", "measured", "device"]
    assert reference[:4] == ["teacher", "one token per step", "", "98.0 ± 0.5 [96.9, 98.7]"]
    assert reference[4:] == ["1000", "30.0", "1.00", "100", "0.3", "2026-11-25", "a machine"]
    assert best[:4] == ["a b", "entropy (default)", "0.5", "97.2 ± 0.5 [96.0, 98.1]"]
    assert best[4:] == ["1000", "6.0", "5.00", "500", "0.06", "2026-11-25", "a machine"]
    for part in ("batch size 64", "-0.8 points", "5.00 times fewer forwards"):
        assert part in table(found)
    assert "†" not in table(found)
    assert found.default_student == "student/a_b"
    assert found.as_json()["default_student"] == "student/a_b"

    metrics = found.as_metrics()
    assert metrics["teacher/one_token_per_step/tpf"] == 1.0
    assert metrics["student/a_b/entropy/threshold"] == 0.5
    assert metrics["student/a_b/entropy/solution"] == 0.972
    assert "student/a_b/entropy/aup" not in metrics, "a sweep of one threshold is no curve"
    assert metrics["headline/nfe_ratio"] == pytest.approx(5)
    assert all(isinstance(value, float) for value in metrics.values())


def test_every_metric_has_a_column() -> None:
    both = {"solution": 0.972, "answer": 0.999}
    point = row("student/a_b", "entropy", 0.5, 0.972, 5.0, operating_point=True)
    judged = Row(**{**vars(point), "measurement": point.measurement.model_copy(update={"metrics": both})})
    found = results([judged], [judged])
    title, _, reference, best = cells(table(found))
    assert title[3:5] == ["solution %", "answer %"]
    assert reference[3:5] == ["98.0 ± 0.5 [96.9, 98.7]", ""]
    assert best[3:5] == ["97.2 ± 0.5 [96.0, 98.1]", "99.9"]
    assert found.as_metrics()["student/a_b/entropy/answer"] == 0.999
    assert found.as_json()["rows"][-1]["metrics"] == both
    assert set(found.as_json()["rows"][-1]["intervals"]) == set(both)


def test_a_student_that_loses_the_accuracy_is_no_default_student() -> None:
    """A student with 0 % accuracy is not announced, at three times the teacher's speed."""
    wrong = student(0.0, tpf=3.12, qualifies=False)
    found = results([wrong], [wrong])
    assert found.default_student is None
    summary = found.summary()
    assert summary["default_student"] is None
    assert summary["students_that_keep_the_accuracy"] == []
    assert "no student keeps the accuracy" in summary["outcome"]
    assert "a b, entropy, is -98.0 points from the teacher's" in summary["outcome"]
    text = table(found)
    assert "No default student: no student keeps the accuracy" in text
    assert "(default)" not in text
    assert "entropy †" in text
    assert "times the teacher's best" not in text
    head = found.as_json()["headline"]
    assert (head["keeps_accuracy"], head["accuracy_loss"]) == (0.0, pytest.approx(0.98))
    assert "tpf_ratio_to_teacher_best" not in head
    headline = {name for name in found.as_metrics() if name.startswith("headline/")}
    assert headline == {"headline/accuracy_loss", "headline/keeps_accuracy"}


def test_a_loss_on_the_test_problems_alone_is_said_and_nothing_is_at_equal_accuracy() -> None:
    found = results([student(0.98)], [student(0.95)])
    assert found.default_student == "student/a_b"
    assert found.summary()["students_that_keep_the_accuracy"] == []
    assert "-3.0 points" in table(found)
    assert "not on the test problems, where it loses more than the 1.0 points" in table(found)
    assert "times the teacher's best" not in table(found)


@pytest.mark.parametrize(
    ("accuracy", "points"), [(0.98, "+0.0"), (0.9799, "+0.0"), (0.986, "+0.6"), (0.97, "-1.0")]
)
def test_equal_accuracy_is_no_negative_difference(accuracy: float, points: str) -> None:
    found = results([student(accuracy)], [student(accuracy)])
    assert f"accuracy is {points} points from" in table(found)


def test_rows_of_several_machines_say_so() -> None:
    elsewhere = student(0.98)
    moved = elsewhere.measurement.model_copy(update={"hardware": "their GPU", "batch_sizes": (8,)})
    text = table(results([elsewhere], [replace(elsewhere, measurement=moved)]))
    assert "times are of different hardware" in text
    assert "times are of different batch sizes" in text
    assert cells(text)[3][-1] == "their GPU"
    assert "different" not in table(results([elsewhere], [elsewhere]))
