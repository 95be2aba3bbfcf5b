"""The command line: `dparallel generate`, `dparallel chat` and `dparallel plan`.

Text goes to stdout; statistics, progress and errors to stderr. What a user can put right is one line
and exit code 2, before any decoding starts.
"""

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from dparallel.cli.chat import chat
from dparallel.cli.generate import generate
from dparallel.cli.parser import build_parser
from dparallel.cli.plan import print_plan
from dparallel.config.base import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Terminated(BaseException):
    """The process was told to end (SIGTERM)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0, 1 where the reader of stdout has left, 2 for a user's error, 130 after Ctrl-C and
        143 after SIGTERM.
    """
    _set_encodings()
    options = build_parser().parse_args(arguments)
    with _termination_raised():
        try:
            if options.command == "generate":
                generate(options)
            elif options.command == "chat":
                chat(options)
            else:
                print_plan(options.config, options.set, options.gpu_memory, options.rate)
            sys.stdout.flush()
        except UserError as error:
            return _refuse(options.command, str(error), error)
        except (KeyboardInterrupt, Terminated) as stop:
            print(f"{'; '.join(['Interrupted', *_notes(stop)])}.", file=sys.stderr)
            return 130 if isinstance(stop, KeyboardInterrupt) else 143
        except BrokenPipeError:  # the reader of stdout has left, as `head` does
            _abandon_stdout()
            return 1
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            if error.filename is None:
                _abandon_stdout()
            return _refuse(options.command, f"{error.filename or 'stdout'}: {error.strerror}", error)
    return 0


def _refuse(command: str, message: str, error: BaseException) -> int:
    line = "; ".join([message, *_notes(error)])
    print(f"dparallel {command}: error: {' '.join(line.split())}", file=sys.stderr)
    return 2


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


def _set_encodings() -> None:
    """A terminal's text is in its own encoding, with escapes for what that lacks; anything else is UTF-8."""
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors=errors)


@contextmanager
def _termination_raised() -> Iterator[None]:
    """SIGTERM raises an exception, as Ctrl-C does, so that a command can say what it has kept."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _abandon_stdout() -> None:
    """Send what is still buffered to nowhere; else Python would fail on it once more as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
