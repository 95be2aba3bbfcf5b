"""Markdown tables of the benchmarks, which also read well in a terminal."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

from tabulate import tabulate

T = TypeVar("T")


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]], texts: Collection[str]) -> str:
    """A table of finished cells; the columns whose titles are in `texts` align left, numbers right."""
    alignment = ["left" if title in texts else "right" for title in titles]
    return tabulate(rows, titles, tablefmt="pipe", colalign=alignment, disable_numparse=True)


def table(results: Sequence[T], columns: Mapping[str, Callable[[T], str]], texts: Collection[str]) -> str:
    """A row for each result; `columns` gives the cell under each title."""
    rows = [[cell(result) for cell in columns.values()] for result in results]
    return markdown(list(columns), rows, texts)
