"""The command line of all flows: `python -m flows.<name> --config FILE [--set key=value ...]`."""

import argparse
import functools
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

from prefect import Flow

from dparallel.config.base import UserError
from dparallel.stages.streams import restart_in_utf8_mode, set_encodings
from flows.logs import thin_out_terminal


def main(flow: Flow, plan: Callable[..., Any], run: Callable[..., Any]) -> None:
    """Run `flow` in this process and print its result after all log messages.

    Errors raised by `plan` are printed as one line with exit code 2, without a flow run. A failed flow has
    exit code 1.

    Args:
        plan: checks the flow's parameters, before Prefect does anything.
        run: does the flow's work with the result of `plan` and the same parameters, so that nothing is
            checked twice.
    """
    restart_in_utf8_mode(f"flows.{flow.name}")
    set_encodings()
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
        help="settings that override the file",
    )
    for choice in ("student", "benchmark"):
        if choice in inspect.signature(flow.fn).parameters:
            parser.add_argument(f"--{choice}", help=f"one {choice} of the config (default: all of them)")
    arguments = vars(parser.parse_args())
    try:
        planned = plan(**arguments)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)

    thin_out_terminal()

    @functools.wraps(flow.fn)
    def run_planned(**parameters: Any) -> Any:
        return run(planned, **parameters)

    try:
        result: str | list[str] = Flow(run_planned, name=flow.name)(**arguments)
    except Exception as error:  # Prefect has logged the traceback
        sys.exit(f"flow {flow.name} failed: {error}")
    finally:
        logging.getLogger("prefect").setLevel(logging.WARNING)  # suppresses the server's message at exit
    print(result if isinstance(result, str) else "\n".join(result), flush=True)
