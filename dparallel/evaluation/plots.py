"""Plots: accuracy against TPF, certainty while decoding, loss curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dparallel.evaluation.cases import TEACHER
from dparallel.evaluation.certainty import CertaintyMap
from dparallel.evaluation.selection import Row
from dparallel.stages import metrics_log

DPI = 200
LEGEND_LINE = 0.17  # height of a line of the legend, inches
BLACK, GREY = "#000000", "#888888"
# The first four are of Okabe and Ito. All have a contrast of at least 3 with white and with dark pages; every
# pair differs by at least 36 in CIELAB. Markers tell models apart for colour-blind readers.
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#9D0AFF",
    "#8F8F00",
    "#FF1A5E",
    "#EB00BC",
    "#0A6CFF",
    "#00AD00",
    "#D76C60",
    "#AE6CDA",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "<", ">", "p", "h", "d", "H")  # of models, as many as colours
REFERENCE_MARKER, FIXED_MARKERS = "*", ("X", "x", "+", "1", "2", "3", "4", "8")  # of single decodings
DASHES: tuple[Any, ...] = (  # of sweeps; the second half is for models beyond the colours
    "-",
    "--",
    ":",
    "-.",
    (0, (5, 1, 1, 1, 1, 1)),
    (0, (8, 3)),
    (0, (1, 4)),
    (0, (3, 4, 1, 4)),
)
PANELS = {
    "loss": "loss",
    "cross_entropy": "cross-entropy with the\nteacher's tokens (nats)",
    "certainty": "certainty term (nats)",
    "student_entropy": "student's entropy (nats)",
}


def plain(name: str) -> str:
    """A readable name of a model or method: `student/few_step` -> `few step`."""
    return name.rpartition("/")[2].replace("_", " ")


@dataclass(frozen=True)
class Point:
    """TPF and accuracy (in %) of a decoding, with half the length of the first's error bar, and both halves
    (below, above) of the second's."""

    tpf: float
    accuracy: float
    tpf_bar: float = 0.0
    accuracy_bars: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Style:
    """Colour and marker of a model, and how many of the line styles are skipped for it."""

    colour: str
    marker: str
    skipped: int = 0

    def dash(self, sweep: int) -> Any:
        """Line style of a sweep, by its number."""
        return DASHES[(sweep + self.skipped) % len(DASHES)]


Curves = Mapping[tuple[str, str], Sequence[Point]]  # by model and method


def tradeoff(rows: Sequence[Row], sweeps: Sequence[str], max_loss: float, out: Path) -> None:
    """Plot accuracy against TPF: a line for each swept (model, method), a marker for each other row.

    Args:
        rows: all rows of a split; the first one is the reference.
        sweeps: methods that were swept, in the order of their line styles.
        max_loss: accepted loss of accuracy (0..1), drawn as a line.
    """
    tradeoff_figure(rows, sweeps, max_loss).savefig(out, dpi=DPI)


def tradeoff_figure(rows: Sequence[Row], sweeps: Sequence[str], max_loss: float) -> Figure:
    """The figure of `tradeoff`."""
    curves: dict[tuple[str, str], list[Point]] = {}
    for row in rows:
        found = row.measurement
        low, high = found.accuracy_interval
        bars = (found.accuracy - low) * 100, (high - found.accuracy) * 100
        point = Point(found.tpf, found.accuracy * 100, accuracy_bars=(max(bars[0], 0), max(bars[1], 0)))
        curves.setdefault((row.model, row.method), []).append(point)
    reference = rows[0].measurement
    wilson = all(row.measurement.kind(next(iter(row.measurement.metrics))) == "correct" for row in rows)
    interval = "Wilson's 95 % interval" if wilson else "95 % interval"
    title = f"{rows[0].split} problems, n = {reference.problems}; bars: {interval}"
    figure = accuracy_figure(curves, sweeps, title)
    axes, styles = figure.axes[0], styles_of(curves)
    chosen = [row for row in rows if row.operating_point]
    axes.scatter(
        [row.measurement.tpf for row in chosen],
        [row.measurement.accuracy * 100 for row in chosen],
        s=150,
        c="none",
        edgecolors=[styles[row.model].colour for row in chosen],
        linewidths=1.4,
        label="operating point",
    )
    limit = (reference.accuracy - max_loss) * 100
    axes.axhline(
        limit, color=GREY, linewidth=0.8, linestyle=":", zorder=0, label=f"lowest allowed, {limit:.1f} %"
    )
    _add_legend(figure)
    return figure


def accuracy_figure(curves: Curves, sweeps: Sequence[str], title: str) -> Figure:
    """A figure of accuracy against TPF.

    Args:
        curves: points by model and method; the reference comes first.
        sweeps: methods drawn as lines, in the order of their line styles; others are drawn as markers.
    """
    figure = Figure(figsize=(8.2, 4.6), layout="constrained")
    axes, styles = figure.add_subplot(), styles_of(curves)
    reference = next(iter(curves))[1]
    fixed = [name for name in dict.fromkeys(name for _, name in curves) if name not in {reference, *sweeps}]
    for (model, method), points in curves.items():
        ordered = sorted(points, key=lambda point: point.tpf)
        style = styles[model]
        if method in sweeps:
            marker, line = style.marker, style.dash(sweeps.index(method))
        else:
            single = FIXED_MARKERS[fixed.index(method) % len(FIXED_MARKERS)] if method in fixed else None
            marker, line = single or REFERENCE_MARKER, "none"
        axes.errorbar(
            [point.tpf for point in ordered],
            [point.accuracy for point in ordered],
            xerr=[point.tpf_bar for point in ordered] if any(point.tpf_bar for point in ordered) else None,
            yerr=list(zip(*(point.accuracy_bars for point in ordered), strict=True)),
            label=f"{plain(model)}, {plain(method)}",
            color=style.colour,
            marker=marker,
            linestyle=line,
            markersize=10 if marker == REFERENCE_MARKER else 5.5,
            linewidth=1.4,
            elinewidth=0.8,
        )
    axes.set_xlabel("tokens per forward pass (TPF)")
    axes.set_ylabel("accuracy (%)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    _add_legend(figure)
    return figure


def styles_of(curves: Curves) -> dict[str, Style]:
    """Styles by model: the teacher is black; where colours and markers repeat, line styles differ."""
    others = [model for model in dict.fromkeys(model for model, _ in curves) if model != TEACHER]
    styles = {TEACHER: Style(BLACK, MARKERS[0])}
    for place, model in enumerate(others):
        cycle, index = divmod(place, len(COLOURS))
        styles[model] = Style(COLOURS[index], MARKERS[index], cycle * len(DASHES) // 2)
    return styles


def _add_legend(figure: Figure) -> None:
    """Add or replace the legend on the right, for which the figure grows: curves, then markers and limits."""
    for legend in list(figure.legends):
        legend.remove()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.set_figheight(max(figure.get_figheight(), LEGEND_LINE * (len(labels) + 2)))
    order = sorted(range(len(labels)), key=lambda i: not isinstance(handles[i], ErrorbarContainer))  # stable
    figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside right upper",
        fontsize=8,
        frameon=False,
        handlelength=3.4,
    )


def printable(text: str) -> str:
    """`text` with a middle dot for each character that has no glyph, such as a line end."""
    return "".join(character if character.isprintable() else "\N{MIDDLE DOT}" for character in text)


def certainty(maps: Sequence[CertaintyMap], block_length: int, title: str, out: Path) -> None:
    """Plot token x step heat maps side by side with a common step scale; committed positions are grey."""
    certainty_figure(maps, block_length, title).savefig(out, dpi=DPI)


def certainty_figure(maps: Sequence[CertaintyMap], block_length: int, title: str) -> Figure:
    """The figure of `certainty`."""
    steps = max(len(seen.probability) for seen in maps)
    length = len(maps[0].tokens)
    width, height = max(2.6, min(0.24 * steps, 5)), min(0.17 * length, 9)  # of a panel, inches
    figure = Figure(figsize=((width + 0.8) * len(maps) + 1.2, height + 1.3), layout="constrained")
    panels = figure.subplots(1, len(maps), sharex=True, squeeze=False)[0]
    colours = colormaps["viridis"].with_extremes(bad="#E8E8E8")
    image = None
    for axes, seen in zip(panels, maps, strict=True):
        step = np.arange(len(seen.probability))
        masked = np.array(seen.commit_step)[:, None] >= step  # (G, steps)
        shown = np.ma.masked_array(seen.probability.numpy().T, ~masked)
        image = axes.imshow(
            shown,
            cmap=colours,
            vmin=0,
            vmax=1,
            aspect="auto",
            interpolation="nearest",
            extent=(-0.5, len(step) - 0.5, length, 0),
        )
        for edge in range(block_length, length, block_length):
            axes.axhline(edge, color="white", linewidth=1.2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{seen.label}: {len(step)} steps", fontsize=10)
        axes.set_xlabel("denoise step")
        axes.set_xlim(-0.5, steps - 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if length <= 64:
            axes.set_yticks(
                np.arange(length) + 0.5, [printable(token) for token in seen.tokens], fontsize=6.5
            )
            axes.tick_params(axis="y", length=0)
    panels[0].set_ylabel("response position")
    assert image is not None
    figure.colorbar(image, ax=list(panels), label="probability of the most likely token", pad=0.01)
    figure.suptitle(title, fontsize=10)
    return figure


def loss_curves(metrics_paths: Mapping[str, str | Path], out: str | Path) -> None:
    """Plot training curves of all students, with a panel for each quantity.

    Args:
        metrics_paths: `metrics.jsonl` of each student's training.

    Raises:
        ValueError: a file is missing or empty.
    """
    curves = {student: metrics_log.read(Path(path)) for student, path in metrics_paths.items()}
    for student, lines in curves.items():
        if not lines:
            raise ValueError(f"student {student}: {metrics_paths[student]} is missing or has no line yet")
    loss_figure(curves).savefig(out, dpi=DPI)


def loss_figure(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """A figure of training curves; `curves` holds the metrics records of each student."""
    quantities = [name for name in PANELS if any(name in line for lines in curves.values() for line in lines)]
    figure = Figure(figsize=(3.1 * len(quantities) + 0.4, 3.2), layout="constrained")
    panels = figure.subplots(1, len(quantities), squeeze=False)[0]
    for axes, name in zip(panels, quantities, strict=True):
        for place, (student, lines) in enumerate(curves.items()):
            cycle, index = divmod(place, len(COLOURS))
            points = [(line["train_step"], line[name]) for line in lines if name in line]
            axes.plot(
                *zip(*points, strict=True),
                color=COLOURS[index],
                linestyle=DASHES[cycle % len(DASHES)],
                linewidth=1.3,
                label=plain(student),
            )
        axes.set_title(PANELS[name], fontsize=10)
        axes.set_xlabel("train step")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    columns = min(len(labels), 6)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return figure
