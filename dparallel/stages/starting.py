"""What has to be done before the command `dparallel` imports its modules.

Ctrl-C during the imports is one line, without a traceback; and torch's threads wait for each other as
`WAITING` says, which they read when torch is imported. The package imports this module before all others. In
programs that use the library it changes nothing.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

# A thread that waits for the others leaves its core after microseconds. By default it keeps the core busy for
# milliseconds; where other programs compute as well, that core is missing to the threads it waits for.
WAITING = {"GOMP_SPINCOUNT": "1000"}


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


if is_command(sys.argv, sys.orig_argv):
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    for name, value in WAITING.items():
        os.environ.setdefault(name, value)
