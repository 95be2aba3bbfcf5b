"""Markdown tables of the benchmarks, also readable in a terminal."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

from tabulate import tabulate

T = TypeVar("T")


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]], texts: Collection[str]) -> str:
    """A table of formatted cells; columns with titles in `texts` are left-aligned, others right-aligned."""
    alignment = ["left" if title in texts else "right" for title in titles]
    return tabulate(rows, titles, tablefmt="pipe", colalign=alignment, disable_numparse=True)


def table(results: Sequence[T], columns: Mapping[str, Callable[[T], str]], texts: Collection[str]) -> str:
    """A table with a row per result; `columns` maps titles to functions that format a cell."""
    rows = [[cell(result) for cell in columns.values()] for result in results]
    return markdown(list(columns), rows, texts)
