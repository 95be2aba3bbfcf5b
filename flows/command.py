"""The command line that all flows share: `python -m flows.<name> --config FILE [--set key=value ...]`."""

import argparse
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

from prefect import Flow


def main(flow: Flow, plan: Callable[..., Any]) -> None:
    """Run `flow` in this process and print what it returns, after all that is logged.

    What `plan` refuses ends with one line and exit code 2, no flow run; a flow that fails with exit code 1.
    """
    summary = (flow.description or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog=f"python -m flows.{flow.name}", description=summary)
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
        result: str | list[str] = flow(**arguments)
    except Exception as error:  # Prefect has logged the traceback
        sys.exit(f"flow {flow.name} failed: {error}")
    finally:
        logging.getLogger("prefect").setLevel(logging.WARNING)  # its server's farewell would come last
    print(result if isinstance(result, str) else "\n".join(result), flush=True)
