"""Report: the results of a benchmark as JSON, flat metrics, a table and plots."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from dparallel.config.experiment import BenchmarkConfig
from dparallel.evaluation import plots
from dparallel.evaluation.cases import Case
from dparallel.evaluation.certainty import CertaintyMap
from dparallel.evaluation.plots import plain
from dparallel.evaluation.selection import Headline, Row, aup_by_sweep, headline, keeping_students
from dparallel.evaluation.texts import (
    KINDS,
    MEASURED,
    accuracy_text,
    interval_notes,
    measured_text,
    sandbox_notes,
    score_text,
)
from dparallel.stages.files import write_atomically

REPORTED = ("accuracy", "accuracy_stderr", "nfe", "tpf", "tps", "latency")
NONE_KEEPS = "no student keeps the accuracy"


@dataclass(frozen=True)
class Results:
    """All measurements and selections.

    Attributes:
        validation, test: all rows of a split; the first one is the reference.
        points: the operating points, as rows of the validation problems that selected them.
        reported: the test rows of the table: reference, fixed decodings, operating points.
        swept: the rows of the split on which whole sweeps were measured.
        aup: AUP by (model, method), on that split; None for a sweep of one threshold.
        headline: the best student compared with the teacher, on the test problems; without validation
            problems, the first student.
        keeping: names of the students that keep the accuracy on all splits.
    """

    config: BenchmarkConfig
    validation: Sequence[Row]
    test: Sequence[Row]
    points: Sequence[Row]
    reported: Sequence[Row]
    swept: Sequence[Row]
    aup: dict[tuple[str, str], float | None]
    headline: Headline
    keeping: Sequence[str]

    @classmethod
    def of(
        cls,
        config: BenchmarkConfig,
        validation: Sequence[Row],
        test: Sequence[Row],
        points: Sequence[Row],
        best: Case,
    ) -> "Results":
        """Compare rows of both splits, in which operating points are marked.

        Args:
            best: operating point of the best student; of the first one without validation problems.
        """
        swept = test if config.sweep_test or not validation else validation
        student = next(row for row in test if row.operating_point and row.case == best)
        teacher = [row for row in test if row.model == test[0].model]
        return cls(
            config=config,
            validation=validation,
            test=test,
            points=points,
            reported=[row for row in test if row.operating_point or row.method not in config.sweeps],
            swept=swept,
            aup=aup_by_sweep(swept, config.sweeps),
            headline=headline(student, test[0], teacher, config.max_loss),
            keeping=keeping_students(test, test[0], config.max_loss),
        )

    @property
    def rows(self) -> list[Row]:
        return [*self.validation, *self.test]

    @property
    def reference(self) -> Row:
        return self.test[0]

    @property
    def default_student(self) -> str | None:
        """Name of the default student; None if none is selected, or keeps the accuracy on validation.

        There is none either if the teacher solves nothing.
        """
        chosen = self.selects and self.headline.student.qualifies and self.reference.measurement.accuracy > 0
        return self.headline.student.model if chosen else None

    @property
    def selects(self) -> bool:
        """Whether thresholds and a student were selected, on validation problems."""
        return self.config.validation is not None

    @property
    def hardware(self) -> list[str]:
        """Hardware of all rows; times are comparable if there is only one entry."""
        return sorted({row.measurement.hardware for row in self.rows})

    @property
    def batch_sizes(self) -> list[int]:
        """Batch sizes of all rows; TPS is comparable if there is only one entry."""
        return sorted({size for row in self.rows for size in row.measurement.batch_sizes})

    def as_json(self) -> dict[str, Any]:
        """All rows, selections and ratios as JSON values, the content of results.json."""
        head = {"student": self.headline.student.flat(), "teacher_best": self.headline.teacher_best.flat()}
        return {
            "rows": [row.flat() for row in self.rows],
            "reference": self.reference.flat(),
            "chosen": [row.flat() for row in self.points],
            "aup": [
                {"model": model, "method": method, "split": self.swept[0].split, "aup": value}
                for (model, method), value in self.aup.items()
            ],
            **self.summary(),
            "headline": {**head, **self.headline.numbers()},
        }

    def summary(self) -> dict[str, Any]:
        """The outcome as a few values."""
        return {
            "default_student": self.default_student,
            "students_that_keep_the_accuracy": list(self.keeping),
            "outcome": outcome(self),
            "hardware": self.hardware,
            "batch_sizes": self.batch_sizes,
        }

    def as_metrics(self) -> dict[str, float]:
        """Metrics of the test rows with flat names such as `teacher/one_token_per_step/tpf`."""
        metrics = {f"headline/{name}": value for name, value in self.headline.numbers().items()}
        for row in self.reported:
            prefix = f"{row.model}/{row.method}"
            shares = {f"{prefix}/{metric}": share for metric, share in row.measurement.metrics.items()}
            shares |= {f"{prefix}/{metric}": value for metric, value in row.measurement.scores.items()}
            metrics |= shares | {f"{prefix}/{name}": getattr(row.measurement, name) for name in REPORTED}
            if row.operating_point and row.threshold is not None:
                metrics[f"{prefix}/threshold"] = row.threshold
        for (model, method), value in self.aup.items():
            if value is not None:
                metrics[f"{model}/{method}/aup"] = value
        return metrics


def write_report(results: Results, maps: Sequence[CertaintyMap], folder: Path) -> list[str]:
    """Write results and plots to `folder`; returns the file names.

    Args:
        maps: certainty of the teacher and of the best student, with the student's decoding or, if that does
            not suit the teacher, the student's rule.
    """
    write_atomically(folder / "results.json", json.dumps(results.as_json(), indent=1))
    write_atomically(folder / "table.md", table(results))
    config, decoding = results.config, results.headline.student.measurement.decoding
    plots.tradeoff(results.swept, list(config.sweeps), config.max_loss, folder / "tradeoff.png")
    title = f"Certainty while decoding, {decoding.rule} threshold {decoding.threshold:g} (grey: committed)"
    plots.certainty(maps, decoding.block_length, title, folder / "certainty.png")
    return ["results.json", "table.md", "tradeoff.png", "certainty.png"]


def table(results: Results) -> str:
    """A Markdown table, also readable in a terminal, with notes."""
    metrics = list(dict.fromkeys(metric for row in results.reported for metric in row.measurement.metrics))
    scores = list(dict.fromkeys(metric for row in results.reported for metric in row.measurement.scores))
    titles = [
        "model",
        "method",
        "threshold",
        *(f"{metric} %" for metric in metrics),
        *scores,
        "n",
        "NFE",
        "TPF",
        "TPS",
        "latency s (batch 1)",
        "measured",
        "device",
    ]
    body = tabulate(
        [_cells(row, metrics, scores, results) for row in results.reported],
        titles,
        tablefmt="pipe",
        colalign=["left", "left", *["right"] * (len(titles) - 4), "left", "left"],
        disable_numparse=True,
    )
    return f"{body}\n\n{notes(results)}\n"


def _cells(row: Row, metrics: Sequence[str], scores: Sequence[str], results: Results) -> list[str]:
    measured = row.measurement
    is_default = results.default_student is not None and row.case == results.headline.student.case
    shares = [f"{measured.metrics[name] * 100:.1f}" if name in measured.metrics else "" for name in metrics]
    shares[0] = accuracy_text(
        measured.accuracy, measured.accuracy_stderr, measured.accuracy_interval, measured.sandbox
    )
    return [
        plain(row.model),
        plain(row.method) + (" (default)" if is_default else "") + ("" if row.qualifies else " †"),
        "" if row.threshold is None else f"{row.threshold:g}",
        *shares,
        *(
            score_text(measured.scores[name], measured.stderrs[name]) if name in measured.scores else ""
            for name in scores
        ),
        f"{measured.problems}",
        f"{measured.nfe:.1f}",
        f"{measured.tpf:.2f}",
        f"{measured.tps:.0f}",
        f"{measured.latency:.3g}",
        measured_text(measured.measured_on, measured.reused, measured.samples),
        measured.hardware,
    ]


def notes(results: Results) -> str:
    """Explanation of the table, and the outcome as a sentence."""
    sizes = sorted({size for row in results.reported for size in row.measurement.batch_sizes})
    hardware = sorted({row.measurement.hardware for row in results.reported})
    explained = interval_notes([row.measurement.model_dump(include=set(KINDS)) for row in results.reported])
    chosen = "chosen on the validation problems" if results.selects else "as given"
    lines = [
        outcome(results),
        " ".join([f"Test problems; thresholds {chosen}.", *explained]),
        f"TPS at batch size {', '.join(map(str, sizes))}, latency of one prompt alone. {MEASURED}",
    ]
    for kind, values in (("hardware", hardware), ("batch sizes", sizes)):
        if len(values) > 1:
            lines.append(
                f"The times are of different {kind}: compare TPS and latency only between rows with equal "
                "entries in results.json."
            )
    if any(not row.qualifies for row in results.reported):
        lines.append("† no threshold kept the accuracy on the validation problems: the most accurate one.")
    lines += sandbox_notes(row.measurement.sandbox for row in results.reported)
    return "\n".join(lines)


def outcome(results: Results) -> str:
    """The headline as a sentence."""
    head, best = results.headline, results.headline.teacher_best
    student = f"{plain(head.student.model)}, {plain(head.student.method)}"
    reference, allowed = plain(results.reference.method), f"{results.config.max_loss * 100:.1f} points"
    if not results.selects:
        kept = "keeps" if head.keeps_accuracy else "does not keep"
        return (
            f"No default student: none is chosen without validation problems. {student} {kept} the accuracy: "
            f"it is {_points(-head.accuracy_loss)} points from the teacher's at {reference} ({allowed} may "
            f"be lost), with {forwards(head.nfe_ratio)}."
        )
    if results.reference.measurement.accuracy == 0:
        return (
            f"No default student: with {reference}, the teacher solves none of the "
            f"{results.reference.measurement.problems:,} test problems, so there is no accuracy to keep."
        )
    if not head.student.qualifies:
        return (
            f"No default student: {NONE_KEEPS}. The best one, {student}, is {_points(-head.accuracy_loss)} "
            f"points from the teacher's at {reference} on the test problems; on the validation problems it "
            f"loses more than the {allowed} that are allowed."
        )
    compared = (
        f"Default student: {student}. On the test problems its accuracy is {_points(-head.accuracy_loss)} "
        f"points from the teacher's at {reference}, with {forwards(head.nfe_ratio)}"
    )
    threshold = "" if best.threshold is None else f" {best.threshold:g}"
    unlisted = "" if best in results.reported else "; not in the table, selected on the test problems"
    rival = f"{plain(best.method)}{threshold}, TPF {best.measurement.tpf:.2f}{unlisted}"
    if not head.keeps_accuracy:
        return (
            f"{compared}: it keeps the accuracy on the validation problems but not on the test problems, "
            f"where it loses more than the {allowed} that are allowed. The teacher's fastest row that loses "
            f"no more: {rival}."
        )
    ratio = f"{head.tpf_ratio_to_teacher_best:.2f} times that of the teacher's fastest row"
    return f"{compared}; its TPF is {ratio} that loses at most {allowed} ({rival})."


def forwards(ratio: float) -> str:
    """The ratio of the reference's forward passes to a student's in words."""
    return f"{ratio:.2f} times fewer forwards" if ratio >= 1 else f"{1 / ratio:.2f} times more forwards"


def _points(share: float) -> str:
    """Signed percentage points; never -0.0."""
    return f"{round(share * 100, 1) + 0.0:+.1f}"
