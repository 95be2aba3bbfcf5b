"""Tables of a report, as texts in columns; Markdown and HTML show the same cells."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from dparallel.evaluation.metrics import RESAMPLES
from dparallel.evaluation.plots import plain
from dparallel.evaluation.texts import (
    MEASURED,
    accuracy_text,
    interval_notes,
    measured_text,
    sandbox_notes,
    score_text,
)
from dparallel.reporting.aup import MEANING
from dparallel.reporting.paired import ASSIGNMENTS, EXACT

Json = dict[str, Any]
# Below `differences`.
ALONE = "Each comparison stands alone: of twenty without any difference, one has p below 0.05."
TESTS = {
    "mcnemar": (
        "Lost and gained: problems that only the other row solves, and that only this one solves. 95 % "
        "interval by Newcombe's method 10 for paired proportions; p: exact two-sided McNemar test."
    ),
    "sign_flip": (
        "Where values lie between wrong and right, lost and gained are the problems on which this row's "
        "value is lower, and higher. 95 % interval of the mean difference by Student's t; p: two-sided test "
        f"by random signs of the differences, exact for up to {EXACT} that are not 0, otherwise with "
        f"{ASSIGNMENTS:,} assignments and a fixed seed."
    ),
    "bootstrap": (
        "Where the accuracy is one number of all responses together, no problem is lost or gained by itself. "
        f"Both rows are compared in the same {RESAMPLES} resamples of the problems: normal 95 % interval of "
        "the difference with their standard deviation; p: twice the share of resamples without a difference "
        "in this direction, at least 0.02."
    ),
    "same": "The same samples: both rows are one measurement, and there is nothing to test.",
    "none": (
        "Rows without a difference: accuracies of different metrics are not compared, and an accuracy that "
        "is one number of all responses together only on exactly the same problems."
    ),
}


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        cell: text of a row.
        text: whether it holds names, aligned to the left; otherwise numbers.
        time: whether its cells differ between repetitions.
    """

    title: str
    cell: Callable[[Json], str]
    text: bool = False
    time: bool = False


@dataclass(frozen=True)
class Table:
    """A table of texts with the columns that they belong to."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Json]

    @property
    def cells(self) -> list[list[str]]:
        """Texts, row by row."""
        return [[column.cell(row) for column in self.columns] for row in self.rows]

    def markdown(self) -> str:
        """The table as Markdown, also readable in a terminal."""
        return tabulate(
            [[cell.replace("|", "\\|") for cell in row] for row in self.cells],
            [column.title for column in self.columns],
            tablefmt="pipe",
            colalign=["left" if column.text else "right" for column in self.columns],
            disable_numparse=True,
        )


def overview(sections: Sequence[Json]) -> Table:
    """Methods x benchmarks: accuracy, NFE and its ratio to the reference's."""
    methods: dict[tuple[str, str, str], Json] = {}
    for section in sections:
        for row in section["rows"]:
            cells = methods.setdefault(
                (row["run"], row["model"], row["method"]),
                {**_names(row), "default": False, "qualifies": True},
            )
            cells[f"in {section['benchmark']}"] = (
                f"{_accuracy(row)}{_mark(row)} · {row['nfe']:.1f} · {row['nfe_speed_up']:.2f}x"
            )

    def cell_of(benchmark: str) -> Callable[[Json], str]:
        return lambda row: str(row.get(f"in {benchmark}", ""))

    columns = [
        Column(f"{section['benchmark']}, {_problems(section['rows'])}", cell_of(section["benchmark"]))
        for section in sections
    ]
    rows = list(methods.values())
    caption = (
        "All benchmarks: accuracy % ± standard error [95 % interval] · NFE · how many times fewer than the "
        "reference"
    )
    return Table(caption, [*_name_columns(rows), *columns], rows)


def settings(rows: Sequence[Json]) -> Table:
    """Settings x runs, of the settings that differ: rows {setting, values: {run: text}}."""

    def value_of(run: str) -> Callable[[Json], str]:
        return lambda row: str(row["values"][run])

    columns = [Column(run, value_of(run), text=True) for run in rows[0]["values"]]
    return Table(
        "Settings that differ", [Column("setting", lambda row: row["setting"], text=True), *columns], rows
    )


def measurements(section: Json) -> Table:
    """The rows of a benchmark with all their numbers."""
    rows = section["rows"]
    further = list(dict.fromkeys(metric for row in rows for metric in list(row["metrics"])[1:]))

    def metric(name: str) -> Column:
        return Column(f"{name} %", lambda row: _percent(row["metrics"].get(name)))

    def score(name: str) -> Column:
        return Column(
            name,
            lambda row: (
                score_text(row["scores"][name], row["stderrs"][name]) if name in row["scores"] else ""
            ),
        )

    columns = [
        *_name_columns(rows),
        Column("threshold", lambda row: "" if row["threshold"] is None else f"{row['threshold']:g}"),
        Column("accuracy %", _accuracy),
        Column("n", lambda row: str(row["problems"])),
        *map(metric, further),
        *map(score, dict.fromkeys(name for row in rows for name in row["scores"])),
        Column("NFE", lambda row: f"{row['nfe']:.1f}"),
        Column("NFE ratio", lambda row: f"{row['nfe_speed_up']:.2f}x"),
        Column("latency s", lambda row: f"{row['times']['latency']:.3g}", time=True),
        Column("latency ratio", lambda row: _times(row["times"]["latency_speed_up"]), time=True),
        Column("TPF", lambda row: f"{row['tpf']:.2f}"),
        Column("TPS", lambda row: f"{row['times']['tps']:.0f}", time=True),
        Column("AUP_2", lambda row: f"{row['aup_2']:.1f}{_begins(row)}"),
        Column("AUP", lambda row: "" if row["aup"] is None else f"{row['aup']:.1f}"),
        Column("measured", _measured, text=True, time=True),
        Column("device", lambda row: row["device"], text=True),
    ]
    return Table(f"{section['benchmark']}: test problems, {_problems(rows)}", columns, rows)


def differences(section: Json) -> Table:
    """Paired comparisons of a benchmark."""
    pairs = section["paired"]
    columns = [
        Column("row", lambda pair: _label(pair["after"]), text=True),
        Column("compared with", lambda pair: _label(pair["before"]), text=True),
        Column("problems", lambda pair: str(pair["problems"])),
        Column("lost", lambda pair: _count(pair["lost"])),
        Column("gained", lambda pair: _count(pair["gained"])),
        Column("difference", lambda pair: _points(pair["difference"])),
        Column("95 % interval", _interval),
        Column("p", lambda pair: _p_value(pair["p_value"])),
    ]
    return Table(
        f"{section['benchmark']}: accuracy on the same problems, in percentage points", columns, pairs
    )


def paired_notes(section: Json) -> list[str]:
    """What the table of differences means."""
    used = {pair["test"] for pair in section["paired"]}
    return [" ".join([*(text for test, text in TESTS.items() if test in used), ALONE])]


def notes(section: Json) -> list[str]:
    """What the table of measurements means."""
    accuracy = list(dict.fromkeys(next(iter(row["metrics"])) for row in section["rows"]))
    lines = [
        " ".join([f"Accuracy is the metric {' or '.join(accuracy)}.", *interval_notes(section["rows"])]),
        "The ratios are speed-ups: NFE and latency (one prompt alone) of the reference, which is the first "
        "row of its run, divided by those of the row.",
        MEANING,
        f"AUP_2: two points, one token per step and this row; y_max = {section['aup_2']['y_max']:.1f} %.",
    ]
    borrowed = [row for row in section["rows"] if _begins(row)]
    if borrowed:
        points = {(row["aup_2_from"]["tpf"], row["aup_2_from"]["accuracy"]) for row in borrowed}
        where = " or ".join(f"TPF {tpf:.2f}, {share * 100:.1f} %" for tpf, share in sorted(points))
        lines[-1] += (
            " ‡ The curve of a model that was not decoded with one token per step begins at the teacher's "
            f"point ({where}); published tables begin at the model's own."
        )
    if section["aup"]:
        lines.append(
            f"AUP: all thresholds of a sweep of at least two, {section['aup']['split']} problems; y_max = "
            f"{section['aup']['y_max']:.1f} %."
        )
    if any(not row["qualifies"] for row in section["rows"]):
        lines.append("† no threshold kept the accuracy on the validation problems: the most accurate one.")
    lines += sandbox_notes(row["sandbox"] for row in section["rows"])
    sizes = sorted({size for row in section["rows"] for size in row["batch_sizes"]})
    lines.append(f"TPS at batch size {', '.join(map(str, sizes))}. {MEASURED}")
    if len({row["device"] for row in section["rows"]}) > 1:
        lines.append("Rows were measured on different devices: latency and TPS compare only on the same one.")
    return lines


def _name_columns(rows: Sequence[Json]) -> list[Column]:
    columns = [
        Column("model", lambda row: plain(row["model"]), text=True),
        Column("method", lambda row: _method(row), text=True),
    ]
    runs = Column("run", lambda row: row["run"], text=True)
    return [runs, *columns] if any(row["run"] for row in rows) else columns


def _names(row: Json) -> Json:
    return {name: row[name] for name in ("run", "model", "method")}


def _method(row: Json) -> str:
    return plain(row["method"]) + (" (default)" if row["default"] else "") + _mark(row)


def _mark(row: Json) -> str:
    return "" if row["qualifies"] else " †"


def _label(named: Json) -> str:
    parts = [named["run"], plain(named["model"]), plain(named["method"])]
    return ", ".join(part for part in parts if part)


def _accuracy(row: Json) -> str:
    return accuracy_text(row["accuracy"], row["accuracy_stderr"], row["accuracy_interval"], row["sandbox"])


def _problems(rows: Sequence[Json]) -> str:
    """The number of problems: `n = 1,319`; of runs with different ones, `n = 8 or 16`."""
    return "n = " + " or ".join(f"{count:,}" for count in sorted({row["problems"] for row in rows}))


def _measured(row: Json) -> str:
    return measured_text(row["times"]["measured_on"], row["times"]["reused"], row["samples"])


def _begins(row: Json) -> str:
    """Marks an AUP_2 whose curve begins at the teacher's point."""
    return "‡" if row["aup_2_from"]["model"] != row["model"] else ""


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share * 100:.1f}"


def _points(share: float | None) -> str:
    """Signed percentage points; never -0.0."""
    return "" if share is None else f"{round(share * 100, 1) + 0.0:+.1f}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _interval(pair: Json) -> str:
    if pair["test"] == "same":
        return "the same samples"
    return " to ".join(filter(None, map(_points, pair["interval"])))


def _count(value: int | None) -> str:
    return "" if value is None else str(value)


def _p_value(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"
