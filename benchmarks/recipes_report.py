"""Tables and plot of a comparison of recipes over seeds."""

import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks.common.side_by_side import BARE, Speed
from benchmarks.common.tables import markdown
from dparallel.evaluation.plots import Point, accuracy_figure, plain
from dparallel.evaluation.report import NONE_KEEPS
from dparallel.reporting.aup import aup_2
from dparallel.reporting.read import Benchmark

COLUMNS = {
    "accuracy": ("solution %", 100, 1),
    "answer": ("answer %", 100, 1),
    "nfe": ("NFE", 1, 2),
    "tpf": ("TPF", 1, 2),
    "aup": ("AUP", 1, 0),
    "aup_2": ("AUP_2", 1, 0),
    "tps": ("TPS", 1, 0),
}


TWO_POINTS = (
    "AUP_2: on the test problems, over two points, as in published tables: one token per step (of the "
    "teacher, where the model was not measured so) and the row of the table."
)


def with_aup_2(runs: Sequence[dict[str, float]], benchmarks: Sequence[Benchmark]) -> list[dict[str, float]]:
    """The flat metrics of several seeds and `…/aup_2` of every row of their benchmarks."""
    values = aup_2(benchmarks).values
    return [
        {
            **run,
            **{
                f"{row.model}/{row.method}/aup_2": values[found.run, row.model, row.method]
                for row in found.reported
            },
        }
        for run, found in zip(runs, benchmarks, strict=True)
    ]


def methods(runs: Sequence[dict[str, float]]) -> list[str]:
    """All `model/method` names in the results, in order."""
    names = dict.fromkeys(key.rpartition("/")[0] for run in runs for key in run)
    return [name for name in names if f"{name}/accuracy" in runs[0]]


def numbers(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over seeds, and standard deviations if there are several, by flat names."""
    pooled = {}
    for name in (f"{method}/{column}" for method in methods(runs) for column in COLUMNS):
        values = [run[name] for run in runs if name in run]
        if values:
            pooled[name] = statistics.mean(values)
        if len(values) > 1:
            pooled[f"{name}_spread"] = statistics.stdev(values)
    return pooled


def table(runs: Sequence[dict[str, float]]) -> str:
    """Markdown from the flat benchmark metrics of several seeds."""
    titles = ["model", "method", "threshold", *(title for title, _, _ in COLUMNS.values())]
    rows = []
    for name in methods(runs):
        model, _, method = name.rpartition("/")
        thresholds = [run.get(f"{name}/threshold") for run in runs]
        cells = [", ".join(f"{threshold:g}" for threshold in thresholds if threshold is not None)]
        for column, (_, scale, digits) in COLUMNS.items():
            values = [run[f"{name}/{column}"] * scale for run in runs if f"{name}/{column}" in run]
            cells.append(mean_and_spread(values, digits))
        rows.append([model.rpartition("/")[2], method, *cells])
    return markdown(titles, rows, texts=["model", "method"])


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """Mean and, for several values, standard deviation, as text."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def headlines(seeds: Sequence[int], results: Sequence[dict[str, Any]]) -> str:
    """The default student of each seed compared with the undistilled teacher; else only the accuracy loss."""
    titles = [
        "seed",
        "default student",
        "points from the teacher's accuracy",
        "NFE, times fewer",
        "TPF, times the teacher's best",
    ]
    rows = []
    for seed, found in zip(seeds, results, strict=True):
        head, student = found["headline"], found["default_student"]
        ratios = [head.get(name) for name in ("nfe_ratio", "tpf_ratio_to_teacher_best")]
        rows.append(
            [
                str(seed),
                NONE_KEEPS if student is None else plain(student),
                f"{round(-head['accuracy_loss'] * 100, 1) + 0.0:+.1f}",
                *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            ]
        )
    return markdown(titles, rows, texts=["seed", "default student"])


def speed_table(speeds: Sequence[Speed]) -> str:
    """Tokens per second side by side, with ratios to the autoregressive bare loop if there is one."""
    sizes = sorted({speed.batch_size for speed in speeds})
    base = next((BARE for speed in speeds if speed.method == BARE), None)
    titles = ["model", "method", "solution %", "NFE"]
    titles += [f"tokens/s, batch {size}" for size in sizes]
    titles += [f"times the {base}, batch {size}" for size in sizes if base]
    rows = []
    for model, method in dict.fromkeys((speed.model, speed.method) for speed in speeds):
        own = {speed.batch_size: speed for speed in speeds if (speed.model, speed.method) == (model, method)}
        one = own[sizes[0]]
        cells = [plain(model), plain(method), f"{one.accuracy:.1%}".rstrip("%"), f"{one.nfe:.1f}"]
        cells += [f"{own[size].tokens_per_second:.0f}" for size in sizes]
        cells += [f"{own[size].ratio:.2f}" for size in sizes if base]
        rows.append(cells)
    return markdown(titles, rows, texts=["model", "method"])


def figure(results: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy against TPF, means over seeds, with error bars of one standard deviation."""
    split = results[0]["aup"][0]["split"]
    found: dict[tuple[str, str], dict[Any, list[tuple[float, float]]]] = {}  # by method, then by threshold
    for row in (row for of_seed in results for row in of_seed["rows"] if row["split"] == split):
        of_method = found.setdefault((row["model"], row["method"]), {})
        of_method.setdefault(row["threshold"], []).append((row["tpf"], row["accuracy"] * 100))
    curves = {key: [_pooled(points) for points in thresholds.values()] for key, thresholds in found.items()}
    sweeps = list(dict.fromkeys(sweep["method"] for sweep in results[0]["aup"]))
    title = f"{split} problems, {len(results)} seeds; bars: standard deviation over seeds"
    return accuracy_figure(curves, sweeps, title)


def _pooled(points: Sequence[tuple[float, float]]) -> Point:
    """Mean TPF and accuracy with their standard deviations over seeds."""
    columns = list(zip(*points, strict=True))
    spreads = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
    tpf, accuracy = map(statistics.mean, columns)
    return Point(tpf, accuracy, spreads[0], (spreads[1], spreads[1]))
