"""The trade-off picture of a benchmark, as a file and inside a page."""

import io
import re
from collections.abc import Sequence
from dataclasses import replace

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from dparallel.evaluation.plots import BLACK, plain, tradeoff_figure
from dparallel.reporting.read import Benchmark


def tradeoff(runs: Sequence[Benchmark]) -> Figure:
    """Accuracy over TPF for all runs of a benchmark, on the split on which sweeps were measured."""
    rows = [
        replace(row, model=f"{run.run}: {plain(row.model)}") if run.run else row
        for run in runs
        for row in run.rows
        if row.split == runs[0].sweep_split
    ]
    swept = {method for run in runs for _, method in run.swept}
    methods = [method for method in dict.fromkeys(row.method for row in rows) if method in swept]
    return tradeoff_figure(rows, methods, runs[0].max_loss)


def inline_svg(figure: Figure, name: str, description: str) -> Markup:
    """The figure as part of a page, in the colour of its text and on its background.

    Args:
        name: prefix of all ids in the picture, which must be unique in the page.
    """
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(BLACK, "currentColor")
    text = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{Markup.escape(description)}"', 1))
