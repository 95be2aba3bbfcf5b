"""The command line of all flows: `python -m flows.<name> --config FILE [--set key=value ...]`."""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import httpx
from prefect import Flow

from dparallel.config.base import UserError
from dparallel.stages.arguments import Parser
from dparallel.stages.permissions import not_permitted
from dparallel.stages.streams import restart_in_utf8_mode, set_encodings
from flows.interruption import Interruption, same_command
from flows.logs import show_on
from flows.server import temporary_server


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
    parser = Parser(prog=f"python -m flows.{flow.name}", description=summary)
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
    parser.add_argument("-v", "--verbose", action="store_true", help="show all log messages")
    arguments = vars(parser.parse_args())
    verbose = arguments.pop("verbose")
    try:
        planned = plan(**arguments)
    except (UserError, OSError) as error:
        message = str(error) if isinstance(error, UserError) else not_permitted(error)
        if message is None:
            raise
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)

    terminal = show_on(sys.stderr, verbose)
    interruption = Interruption(terminal.say, terminal.mute, lambda: terminal.stage)

    @functools.wraps(flow.fn)
    def run_planned(**parameters: Any) -> Any:
        return run(planned, **parameters)

    try:
        terminal.say(f"{flow.name}: starting")
        with temporary_server():
            local = Flow(run_planned, flow.name, flow.version, flow.flow_run_name)
            result: str | list[str] = local(**arguments)
    except BaseException as error:  # Prefect has logged the traceback
        if interruption.number is not None:
            interruption.leave()
        if not isinstance(error, Exception):
            raise
        if isinstance(error, httpx.RequestError):
            error = ConnectionError(
                f"Prefect's server does not answer ({error}): what is done is kept. To go on, give the same "
                f"command: {same_command()}"
            )
        sys.exit(f"flow {flow.name} failed: {error}")
    interruption.over()
    print(result if isinstance(result, str) else "\n".join(result), flush=True)
