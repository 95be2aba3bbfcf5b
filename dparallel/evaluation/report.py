"""What a benchmark found, as JSON, as flat metrics, and as a table to read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dparallel.evaluation.plots import plain
from dparallel.evaluation.selection import Headline, Row

REPORTED = ("accuracy", "accuracy_stderr", "answer_accuracy", "nfe", "tpf", "tps", "latency")


@dataclass(frozen=True)
class Results:
    """Everything measured and chosen.

    Attributes:
        rows: all of them, both splits.
        chosen: the operating points, on the validation problems that chose them.
        reported: the test rows to compare: reference, fixed decodings, operating points.
        aup: by (model, method), on `sweep_split`.
    """

    rows: Sequence[Row]
    reference: Row
    chosen: Sequence[Row]
    reported: Sequence[Row]
    aup: dict[tuple[str, str], float]
    sweep_split: str
    default_student: Row
    headline: Headline

    @property
    def hardware(self) -> list[str]:
        """What was timed, of all rows; times are comparable where it is one."""
        return sorted({row.measurement.hardware for row in self.rows})

    def as_json(self) -> dict[str, Any]:
        return {
            "rows": [row.flat() for row in self.rows],
            "reference": self.reference.flat(),
            "chosen": [row.flat() for row in self.chosen],
            "aup": [
                {"model": model, "method": method, "split": self.sweep_split, "aup": value}
                for (model, method), value in self.aup.items()
            ],
            "default_student": self.default_student.model,
            "headline": {
                "student": self.headline.student.flat(),
                "teacher_best": self.headline.teacher_best.flat(),
                **self.headline.numbers(),
            },
            "hardware": "; ".join(self.hardware),
            "batch_size": self.reference.measurement.batch_size,
        }

    def as_metrics(self) -> dict[str, float]:
        """Flat names such as `teacher/one_token_per_step/tpf`, of the test rows."""
        metrics = {f"headline/{name}": value for name, value in self.headline.numbers().items()}
        for row in self.reported:
            prefix = f"{row.model}/{row.method}"
            for name in REPORTED:
                value = getattr(row.measurement, name)
                if value is not None:
                    metrics[f"{prefix}/{name}"] = value
            if row.operating_point and row.threshold is not None:
                metrics[f"{prefix}/threshold"] = row.threshold
        for (model, method), value in self.aup.items():
            metrics[f"{model}/{method}/aup"] = value
        return metrics


HEADER = (
    *("model", "method", "threshold", "solution %", "answer %"),
    *("NFE", "TPF", "TPS", "latency s (batch 1)", "samples"),
)


def table(results: Results) -> str:
    """Markdown that also reads well in a terminal."""
    lines = [list(HEADER), *(_cells(row, results.default_student) for row in results.reported)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    aligned = [
        [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    rule = ["-" * width if column < 2 else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    body = "\n".join(f"| {' | '.join(line)} |" for line in [aligned[0], rule, *aligned[1:]])
    return f"{body}\n\n{notes(results)}\n"


def _cells(row: Row, default: Row) -> list[str]:
    measured = row.measurement
    is_default = (row.model, row.method) == (default.model, default.method)
    return [
        plain(row.model),
        plain(row.method) + (" (default)" if is_default else "") + ("" if row.qualifies else " †"),
        "" if row.threshold is None else f"{row.threshold:g}",
        f"{measured.accuracy:.1%} ± {measured.accuracy_stderr:.1%}".replace("%", ""),
        "" if measured.answer_accuracy is None else f"{measured.answer_accuracy * 100:.1f}",
        f"{measured.nfe:.1f}",
        f"{measured.tpf:.2f}",
        f"{measured.tps:.0f}",
        f"{measured.latency:.3g}",
        f"{measured.samples}",
    ]


def notes(results: Results) -> str:
    """How to read the table, and the headline in a sentence."""
    head, measured = results.headline, results.reference.measurement
    best = head.teacher_best
    unlisted = "" if best in results.reported else "; not in the table, chosen on these very problems"
    lines = [
        f"Default student: {plain(head.student.model)}, {plain(head.student.method)}. "
        f"On the test problems its accuracy is {_points(-head.accuracy_loss)} points from the teacher's at "
        f"{plain(results.reference.method)}, with {head.nfe_ratio:.2f} times fewer forwards; "
        f"its TPF is {head.tpf_ratio_to_teacher_best:.2f} times the teacher's best at equal accuracy "
        f"({plain(best.method)}{'' if best.threshold is None else f' {best.threshold:g}'}, "
        f"TPF {best.measurement.tpf:.2f}{unlisted}).",
        "Test problems; thresholds chosen on the validation problems. ± is one standard error. "
        f"Times: {'; '.join(results.hardware)}; "
        f"TPS at batch size {measured.batch_size}, latency of one prompt alone.",
    ]
    if len(results.hardware) > 1:
        lines.append(
            "The times are of different hardware: TPS and latency compare only between rows of the same, "
            "which results.json names."
        )
    if any(not row.qualifies for row in results.reported):
        lines.append("† no threshold kept the accuracy on the validation problems: the most accurate one.")
    return "\n".join(lines)


def _points(share: float) -> str:
    """Percentage points with their sign; never -0.0."""
    return f"{round(share * 100, 1) + 0.0:+.1f}"
