"""Arguments that several commands have, each written once."""

import argparse
from pathlib import Path
from typing import Any

from dparallel.cli.argument_types import as_runs, as_stop, as_text

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_command(
    commands: Any, name: str, summary: str, more: str = "", usage: str | None = None
) -> argparse.ArgumentParser:
    """Add a command.

    Args:
        more: sentences that its own help shows after the summary.
        usage: its arguments in the line of usage; by default all of them.
    """
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary}. {more}" if more else summary,
        usage=usage and f"dparallel {name} {usage}",
        allow_abbrev=False,
    )
    return command


def add_model(group: Any, several: bool = False) -> None:
    group.add_argument(
        "--model",
        metavar="MODEL",
        required=True,
        action="append" if several else "store",
        help="checkpoint folder, or Hugging Face Hub id"
        + ("; may be given several times" if several else ""),
    )


def add_device(group: Any) -> None:
    group.add_argument("--device", help="cpu, cuda or cuda:1 (default: a GPU if there is one)")
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="dtype of the weights (default: the checkpoint's)"
    )


def add_texts(group: Any) -> None:
    group.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        type=as_stop,
        help="end a response before this text; may be given several times",
    )
    group.add_argument("--plain", action="store_true", help="no live canvas, no colour (as with NO_COLOR)")


def add_folder_of_runs(group: Any, meaning: str = "folder of experiments") -> None:
    group.add_argument(
        "--runs",
        metavar="FOLDER",
        type=as_runs,
        default=Path("runs"),
        help=f"{meaning} (default: %(default)s)",
    )


def add_settings(group: Any, what: str) -> None:
    """Add `--set KEY=VALUE ...`."""
    group.add_argument(
        "--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], type=as_text, help=what
    )
