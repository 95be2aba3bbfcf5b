"""Choose: select thresholds and a student, and compare speeds. Pure functions of measured rows."""

from collections.abc import Container, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dparallel.evaluation.cases import STUDENT, Case
from dparallel.evaluation.measure import Measurement
from dparallel.evaluation.metrics import accuracy_under_parallelism
from dparallel.evaluation.store import Keys


@dataclass(frozen=True)
class Row:
    """A measurement of a model with a method on a split.

    Attributes:
        keys: keys of its samples and verdicts in the store; None if unknown.
        operating_point: whether this is the selected threshold of a sweep.
        qualifies: whether that threshold kept the accuracy on the validation problems.
    """

    model: str
    method: str
    split: str
    measurement: Measurement
    keys: Keys | None = None
    operating_point: bool = False
    qualifies: bool = True

    @property
    def threshold(self) -> float | None:
        return self.measurement.decoding.threshold

    @property
    def case(self) -> Case:
        return Case(self.model, self.method, self.measurement.decoding)

    @property
    def label(self) -> str:
        """A short description for log messages."""
        threshold = "" if self.threshold is None else f" {self.threshold:g}"
        found = self.measurement
        metric = next(iter(found.metrics))
        accuracy = f"{found.accuracy:.1%} of {found.problems} right"
        if found.kind(metric) != "correct":
            accuracy = f"{metric} {found.accuracy:.1%} on {found.problems}"
        return (
            f"{self.split}: {self.model}, {self.method}{threshold}: {accuracy}, "
            f"NFE {found.nfe:.1f}, TPF {found.tpf:.2f}"
        )

    def flat(self) -> dict[str, Any]:
        """A JSON object of plain values."""
        return {
            "model": self.model,
            "method": self.method,
            "split": self.split,
            "threshold": self.threshold,
            "operating_point": self.operating_point,
            "qualifies": self.qualifies,
            "keys": None if self.keys is None else asdict(self.keys),
            **self.measurement.model_dump(mode="json"),
            "intervals": {name: list(ends) for name, ends in self.measurement.intervals.items()},
        }


def keeps_accuracy(row: Row, reference: Row, max_loss: float) -> bool:
    """Whether the accuracy of `row` is at most `max_loss` (0..1) below the reference's."""
    return row.measurement.accuracy >= reference.measurement.accuracy - max_loss - 1e-9


def operating_points(rows: Sequence[Row], swept: Iterable[Case], max_loss: float) -> list[Row]:
    """The selected threshold of each (model, method) of `swept`; the first of `rows` is the reference."""
    groups = dict.fromkeys((case.model, case.method) for case in swept)
    return [
        operating_point([row for row in rows if (row.model, row.method) == group], rows[0], max_loss)
        for group in groups
    ]


def operating_point(sweep: Sequence[Row], reference: Row, max_loss: float) -> Row:
    """The row with the highest TPF that keeps the accuracy; else the most accurate, not qualifying."""
    keeping = [row for row in sweep if keeps_accuracy(row, reference, max_loss)]
    if keeping:
        return replace(_fastest(keeping), operating_point=True)
    return replace(_most_accurate(sweep), operating_point=True, qualifies=False)


def mark(rows: Sequence[Row], points: Iterable[Row]) -> list[Row]:
    """`rows` of any split with the selected thresholds marked."""
    qualifies = {point.case: point.qualifies for point in points}
    return [
        replace(row, operating_point=True, qualifies=qualifies[row.case]) if row.case in qualifies else row
        for row in rows
    ]


def slower(point: Row, sweep: Iterable[Row]) -> list[Row]:
    """The rows of `sweep` with a TPF below that of `point`, the fastest first."""
    rows = [row for row in sweep if row.measurement.tpf < point.measurement.tpf]
    return sorted(rows, key=_speed, reverse=True)


def best_student(points: Iterable[Row]) -> Row:
    """The operating point of the best student: the fastest one that qualifies.

    If none qualifies, it is the most accurate one, which is not a default student (`qualifies` is False).
    """
    students = [row for row in points if row.model.startswith(STUDENT)]
    qualifying = [row for row in students if row.qualifies]
    return _fastest(qualifying) if qualifying else _most_accurate(students)


def keeping_students(test: Iterable[Row], reference: Row, max_loss: float) -> list[str]:
    """Names of the students with an operating point that keeps the accuracy on both splits.

    None does if the teacher solves nothing.
    """
    if reference.measurement.accuracy == 0:
        return []
    keeping = [
        row.model
        for row in test
        if row.model.startswith(STUDENT)
        and row.operating_point
        and row.qualifies
        and keeps_accuracy(row, reference, max_loss)
    ]
    return list(dict.fromkeys(keeping))


@dataclass(frozen=True)
class Headline:
    """The best student compared with the undistilled teacher, on the test problems.

    `teacher_best` is the fastest row of the teacher that keeps the accuracy *on the test problems*. The rows
    considered are the fixed decodings and, for each sweep, all thresholds (with `sweep_test`) or the
    operating point and, if that misses the accuracy, slower ones until one keeps it. Of the student, only
    the operating point is considered. Ratios above 1 favour the student. Losses are shares (0..1); a
    negative loss is a gain.
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
        """Loss and ratios; only the loss if no student qualifies, since no speed compensates for it."""
        numbers = {
            name: float(value)
            for name, value in vars(self).items()
            if isinstance(value, int | float)  # including bool
        }
        if self.student.qualifies:
            return numbers
        return {name: numbers[name] for name in ("accuracy_loss", "keeps_accuracy")}


def headline(student: Row, reference: Row, teacher_rows: Iterable[Row], max_loss: float) -> Headline:
    """Compare rows of the test problems; `teacher_rows` include the reference."""
    best = _fastest([row for row in [reference, *teacher_rows] if keeps_accuracy(row, reference, max_loss)])
    mine, base, rival = student.measurement, reference.measurement, best.measurement
    return Headline(
        student=student,
        reference=reference,
        teacher_best=best,
        accuracy_loss=base.accuracy - mine.accuracy,
        keeps_accuracy=student.qualifies and keeps_accuracy(student, reference, max_loss),
        nfe_ratio=base.nfe / mine.nfe,
        tpf_ratio=mine.tpf / base.tpf,
        nfe_ratio_to_teacher_best=rival.nfe / mine.nfe,
        tpf_ratio_to_teacher_best=mine.tpf / rival.tpf,
    )


def aup_by_sweep(rows: Sequence[Row], sweeps: Container[str]) -> dict[tuple[str, str], float | None]:
    """AUP of each (model, method) whose method is in `sweeps`; `rows` are all rows of a split.

    None for a sweep of one threshold: the area under one point takes nothing off for a loss of accuracy.
    """
    best = max(row.measurement.accuracy for row in rows) * 100
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row.method in sweeps:
            point = row.measurement.tpf, row.measurement.accuracy * 100
            points.setdefault((row.model, row.method), []).append(point)
    return {
        key: accuracy_under_parallelism(curve, best) if len(curve) > 1 else None
        for key, curve in points.items()
    }


def _fastest(rows: Iterable[Row]) -> Row:
    return max(rows, key=_speed)


def _most_accurate(rows: Iterable[Row]) -> Row:
    return max(rows, key=lambda row: (row.measurement.accuracy, row.measurement.tpf))


def _speed(row: Row) -> tuple[float, float]:
    return row.measurement.tpf, row.measurement.accuracy
