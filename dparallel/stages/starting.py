"""Ctrl-C while the command `dparallel` still imports its modules: one line, without a traceback.

The package imports this module before all others. In programs that use the library it changes nothing.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn


def is_command(given: list[str], whole: list[str]) -> bool:
    """Whether the process is `dparallel` or `python -m dparallel`.

    Args:
        given: `sys.argv`, whose first item is `-m` while the package of a `python -m` command is imported.
        whole: `sys.orig_argv`, all arguments of the interpreter.
    """
    if given[:1] == ["-m"]:
        return "-m" in whole and whole[whole.index("-m") + 1 :][:1] == ["dparallel"]
    return bool(given) and Path(given[0]).stem == "dparallel" and given[0] in whole


def command_begins() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt, which the command handles."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    print("Interrupted before anything began.", file=sys.stderr, flush=True)
    os._exit(128 + number)


if is_command(sys.argv, sys.orig_argv) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
