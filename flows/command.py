"""The command line that all flows share: `python -m flows.<name> --config FILE [--set key=value ...]`."""

import argparse
import inspect
import sys
from collections.abc import Callable
from typing import Any

from prefect import Flow


def main(flow: Flow, plan: Callable[..., Any]) -> None:
    """Run `flow` in this process; what `plan` refuses ends with one line and exit code 2, no flow run."""
    parser = argparse.ArgumentParser(prog=f"python -m flows.{flow.name}", description=flow.description)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, see configs/")
    parser.add_argument(
        "--set",
        dest="overrides",
        nargs="+",
        action="extend",
        default=[],
        metavar="key.sub=value",
        help="settings that replace the file's",
    )
    if "student" in inspect.signature(flow.fn).parameters:
        parser.add_argument("--student", help="one student of the config (all of them unless told)")
    arguments = vars(parser.parse_args())
    try:
        plan(**arguments)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    try:
        flow(**arguments)
    except Exception as error:  # Prefect has logged the traceback
        sys.exit(f"flow {flow.name} failed: {error}")
