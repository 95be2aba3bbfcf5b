"""`dparallel compare`: past runs in one table, with paired tests on the same problems."""

import os
from collections.abc import Sequence
from pathlib import Path

from dparallel.config.base import ConfigError
from dparallel.reporting.compare import STEM, compare


def print_comparison(given: Sequence[str], runs: Path, out: Path | None) -> None:
    """Print the comparison as Markdown.

    Args:
        given: two or more runs: folders, names of experiments, or ids of MLflow runs.
        runs: folder of experiments.
        out: folder for the comparison as HTML, JSON and Markdown, with pictures.

    Raises:
        UserError: a run cannot be compared, or `out` cannot be written to.
    """
    if len(given) < 2:
        raise ConfigError(f"{given[0]}: give two or more runs; the report of one lies in its folder")
    if out is not None and os.path.exists(out) and not os.path.isdir(out):
        raise ConfigError(f"--out {out} is a file: name a folder")
    document = compare(given, runs)
    print(document.markdown(pictures=False), end="")
    if out is not None:
        for name in document.write(out, STEM):
            print(out / name)
