"""Which threshold, which student, how much faster: pure functions over measured rows."""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dparallel.evaluation.measure import Measurement
from dparallel.evaluation.metrics import accuracy_under_parallelism

TEACHER, STUDENT, BASELINE = "teacher", "student/", "baseline/"  # names of inputs, or how they begin


@dataclass(frozen=True)
class Row:
    """One measurement in its place: which model, by which method, on which split.

    `operating_point` marks a sweep's chosen threshold, `qualifies` whether that one lost no more
    accuracy on the validation problems than allowed.
    """

    model: str
    method: str
    split: str
    measurement: Measurement
    operating_point: bool = False
    qualifies: bool = True
    samples_file: str = ""

    @property
    def threshold(self) -> float | None:
        return self.measurement.decoding.threshold

    def flat(self) -> dict[str, Any]:
        """One JSON object of plain values."""
        return {
            "model": self.model,
            "method": self.method,
            "split": self.split,
            "threshold": self.threshold,
            "operating_point": self.operating_point,
            "qualifies": self.qualifies,
            "samples_file": self.samples_file,
            **self.measurement.model_dump(mode="json"),
        }


def keeps_accuracy(row: Row, reference: Row, max_loss: float) -> bool:
    """Whether `row` loses at most `max_loss` (0..1) of the reference's accuracy."""
    return row.measurement.accuracy >= reference.measurement.accuracy - max_loss - 1e-9


def operating_point(sweep: Sequence[Row], reference: Row, max_loss: float) -> Row:
    """The row of highest TPF that keeps the accuracy; else the most accurate, marked as not qualifying."""
    keeping = [row for row in sweep if keeps_accuracy(row, reference, max_loss)]
    if keeping:
        return replace(_fastest(keeping), operating_point=True)
    best = max(sweep, key=lambda row: (row.measurement.accuracy, row.measurement.tpf))
    return replace(best, operating_point=True, qualifies=False)


def slower(point: Row, sweep: Iterable[Row]) -> list[Row]:
    """The rows of `sweep` below `point`'s TPF, the fastest first."""
    rows = [row for row in sweep if row.measurement.tpf < point.measurement.tpf]
    return sorted(rows, key=_speed, reverse=True)


def default_student(points: Iterable[Row]) -> Row:
    """The student's operating point of highest TPF, qualifying ones before others."""
    students = [row for row in points if row.model != TEACHER]
    qualifying = [row for row in students if row.qualifies]
    if qualifying:
        return _fastest(qualifying)
    return max(students, key=lambda row: (row.measurement.accuracy, row.measurement.tpf))


@dataclass(frozen=True)
class Headline:
    """The default student against the undistilled teacher, on the test problems.

    `teacher_best` is the fastest row that keeps the accuracy *on the test problems* among those of
    the teacher that were measured there: the fixed decodings and, for each sweep, all thresholds
    (`sweep_test`) or the operating point and, where that misses the accuracy, slower ones until one
    keeps it. The student has its operating point alone. Ratios above 1 favour the student. Losses
    are shares (0..1); negative ones are gains.
    """

    student: Row
    reference: Row
    teacher_best: Row
    accuracy_loss: float
    keeps_accuracy: bool
    nfe_ratio: float
    tpf_ratio: float
    nfe_ratio_to_teacher_best: float
    tpf_ratio_to_teacher_best: float

    def numbers(self) -> dict[str, float]:
        return {
            name: float(value)
            for name, value in vars(self).items()
            if isinstance(value, int | float)  # bool is one
        }


def headline(student: Row, reference: Row, teacher_rows: Iterable[Row], max_loss: float) -> Headline:
    """Compare rows of the test problems; the reference is one of the teacher's."""
    best = _fastest([row for row in [reference, *teacher_rows] if keeps_accuracy(row, reference, max_loss)])
    mine, base, rival = student.measurement, reference.measurement, best.measurement
    return Headline(
        student=student,
        reference=reference,
        teacher_best=best,
        accuracy_loss=base.accuracy - mine.accuracy,
        keeps_accuracy=keeps_accuracy(student, reference, max_loss),
        nfe_ratio=base.nfe / mine.nfe,
        tpf_ratio=mine.tpf / base.tpf,
        nfe_ratio_to_teacher_best=rival.nfe / mine.nfe,
        tpf_ratio_to_teacher_best=mine.tpf / rival.tpf,
    )


def aup_by_sweep(rows: Sequence[Row], sweeps: Container[str]) -> dict[tuple[str, str], float]:
    """AUP of each (model, method) whose method is one of `sweeps`; `rows` are all rows of one split."""
    best = max(row.measurement.accuracy for row in rows) * 100
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row.method in sweeps:
            point = row.measurement.tpf, row.measurement.accuracy * 100
            points.setdefault((row.model, row.method), []).append(point)
    return {key: accuracy_under_parallelism(each, best) for key, each in points.items()}


def _fastest(rows: Iterable[Row]) -> Row:
    return max(rows, key=_speed)


def _speed(row: Row) -> tuple[float, float]:
    return row.measurement.tpf, row.measurement.accuracy
