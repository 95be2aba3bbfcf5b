"""The command line that all flows share: `python -m flows.<name> --config FILE [--set key=value ...]`."""

import argparse
import functools
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

from prefect import Flow

from dparallel.config.base import UserError


def main(flow: Flow, plan: Callable[..., Any], run: Callable[..., Any]) -> None:
    """Run `flow` in this process and print what it returns, after all that is logged.

    What `plan` refuses ends with one line, exit code 2 and no flow run; a flow that fails, with exit code 1.

    Args:
        plan: checks the flow's parameters, before Prefect is asked to do anything.
        run: does the flow's work, from what `plan` returned and the same parameters. So nothing is checked
            a second time in the flow run.
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
        parser.add_argument("--student", help="one student of the config (default: all of them)")
    arguments = vars(parser.parse_args())
    try:
        planned = plan(**arguments)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)

    @functools.wraps(flow.fn)
    def run_planned(**parameters: Any) -> Any:
        return run(planned, **parameters)

    try:
        result: str | list[str] = Flow(run_planned, name=flow.name)(**arguments)
    except Exception as error:  # Prefect has logged the traceback
        sys.exit(f"flow {flow.name} failed: {error}")
    finally:
        logging.getLogger("prefect").setLevel(logging.WARNING)  # its server's farewell would come last
    print(result if isinstance(result, str) else "\n".join(result), flush=True)
