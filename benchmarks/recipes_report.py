"""What a comparison of recipes over seeds says: its tables and its picture."""

import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks.common.side_by_side import BARE, Speed
from dparallel.evaluation.plots import BLACK, COLOURS, DASHES, MARKERS, plain
from dparallel.evaluation.selection import TEACHER

COLUMNS = {
    "accuracy": ("solution %", 100, 1),
    "answer_accuracy": ("answer %", 100, 1),
    "nfe": ("NFE", 1, 2),
    "tpf": ("TPF", 1, 2),
    "aup": ("AUP", 1, 0),
    "tps": ("TPS", 1, 0),
}


def methods(runs: Sequence[dict[str, float]]) -> list[str]:
    """`model/method` of everything reported, in order."""
    names = dict.fromkeys(key.rpartition("/")[0] for run in runs for key in run)
    return [name for name in names if f"{name}/accuracy" in runs[0]]


def numbers(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over seeds, and their standard deviation where there are several, by flat names."""
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
    rows = [["model", "method", "threshold", *(title for title, _, _ in COLUMNS.values())]]
    for name in methods(runs):
        model, _, method = name.rpartition("/")
        thresholds = [run.get(f"{name}/threshold") for run in runs]
        cells = [", ".join(f"{each:g}" for each in thresholds if each is not None)]
        for column, (_, scale, digits) in COLUMNS.items():
            values = [run[f"{name}/{column}"] * scale for run in runs if f"{name}/{column}" in run]
            cells.append(mean_and_spread(values, digits))
        rows.append([model.rpartition("/")[2], method, *cells])
    return _markdown(rows, text_columns=2)


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def headlines(seeds: Sequence[int], results: Sequence[dict[str, Any]]) -> str:
    """The default student of each seed against the undistilled teacher."""
    rows = [["seed", "default student", "points lost", "NFE, times fewer", "TPF, times the teacher's best"]]
    for seed, each in zip(seeds, results, strict=True):
        head = each["headline"]
        rows.append(
            [
                str(seed),
                each["default_student"].rpartition("/")[2],
                f"{head['accuracy_loss'] * 100:+.1f}",
                f"{head['nfe_ratio']:.2f}",
                f"{head['tpf_ratio_to_teacher_best']:.2f}",
            ]
        )
    return _markdown(rows, text_columns=2)


def speed_table(speeds: Sequence[Speed]) -> str:
    """Tokens per second side by side; ratios to the autoregressive bare loop, where there is one."""
    sizes = sorted({each.batch_size for each in speeds})
    base = next((BARE for each in speeds if each.method == BARE), None)
    rows = [["model", "method", "solution %", "NFE"]]
    rows[0] += [f"tokens/s, batch {size}" for size in sizes]
    rows[0] += [f"times the {base}, batch {size}" for size in sizes if base]
    for model, method in dict.fromkeys((each.model, each.method) for each in speeds):
        own = {each.batch_size: each for each in speeds if (each.model, each.method) == (model, method)}
        one = own[sizes[0]]
        cells = [plain(model), plain(method), f"{one.accuracy:.1%}".rstrip("%"), f"{one.nfe:.1f}"]
        cells += [f"{own[size].tokens_per_second:.0f}" for size in sizes]
        cells += [f"{own[size].ratio:.2f}" for size in sizes if base]
        rows.append(cells)
    return _markdown(rows, text_columns=2)


def figure(results: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy against TPF, means over seeds; bars are the standard deviation over seeds."""
    split = results[0]["aup"][0]["split"]
    rows = [row for each in results for row in each["rows"] if row["split"] == split]
    models = list(dict.fromkeys(row["model"] for row in rows))
    swept = list(dict.fromkeys(each["method"] for each in results[0]["aup"]))
    drawing = Figure(figsize=(8.2, 5.0), layout="constrained")
    axes = drawing.add_subplot()
    for model, method in dict.fromkeys((row["model"], row["method"]) for row in rows):
        points: dict[Any, list[tuple[float, float]]] = {}
        for row in rows:
            if (row["model"], row["method"]) == (model, method):
                points.setdefault(row["threshold"], []).append((row["tpf"], row["accuracy"] * 100))
        pooled = sorted(_pooled(each) for each in points.values())
        line = method in swept
        style = swept.index(method) if line else 0
        axes.errorbar(
            [each[0] for each in pooled],
            [each[1] for each in pooled],
            xerr=[each[2] for each in pooled],
            yerr=[each[3] for each in pooled],
            label=f"{plain(model)}, {plain(method)}",
            color=BLACK if model == TEACHER else COLOURS[(models.index(model) - 1) % len(COLOURS)],
            marker=MARKERS[style % len(MARKERS)] if line else "*",
            linestyle=DASHES[style % len(DASHES)] if line else "none",
            markersize=5 if line else 10,
            linewidth=1.3,
            elinewidth=0.8,
        )
    axes.set_xlabel("tokens per forward (TPF)")
    axes.set_ylabel("solution accuracy (%)")
    axes.set_title(
        f"{split} problems, {len(results)} seeds; bars: standard deviation over seeds", fontsize=10
    )
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    drawing.legend(loc="outside right upper", fontsize=8, frameon=False, handlelength=3.4)
    return drawing


def _pooled(points: Sequence[tuple[float, float]]) -> tuple[float, float, float, float]:
    """Mean TPF and accuracy, and their spread over seeds."""
    columns = list(zip(*points, strict=True))
    spreads = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in columns]
    return statistics.mean(columns[0]), statistics.mean(columns[1]), *spreads


def _markdown(rows: Sequence[Sequence[str]], text_columns: int) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    rule = "|" + "---|" * text_columns + "---:|" * (len(rows[0]) - text_columns)
    return "\n".join([lines[0], rule, *lines[1:]])
