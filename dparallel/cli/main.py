"""The command line: `dparallel` with its commands, each a module of this package.

Text goes to stdout; statistics, progress and errors go to stderr. Errors that the user can correct are one
line with exit code 2, raised before decoding starts.
"""

import argparse
import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType

from dparallel.cli.decoding_arguments import in_flags
from dparallel.cli.parser import build_parser
from dparallel.config.base import UserError
from dparallel.stages import starting
from dparallel.stages.permissions import not_permitted
from dparallel.stages.streams import set_encodings

DECODING_COMMANDS = ("generate", "chat", "serve", "eval")  # their settings of decoding are flags
THREADS = "dparallel.models.threads"  # the module whose messages say how many threads are used, and why
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Terminated(BaseException):
    """The process received SIGTERM."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0; 1 if the reader of stdout has closed it; 2 for a user's error; 130 after Ctrl-C;
        143 after SIGTERM.
    """
    set_encodings()
    options = build_parser().parse_args(arguments)
    with _termination_raised(), _threads_said():
        try:
            command = _command(options)
            starting.command_begins()
            command()
            sys.stdout.flush()
        except UserError as error:
            return _refuse(
                options.command, str(error), error, sys.argv[1:] if arguments is None else arguments
            )
        except (KeyboardInterrupt, Terminated) as stop:
            print(f"{'; '.join(['Interrupted', *_notes(stop)])}.", file=sys.stderr)
            return 130 if isinstance(stop, KeyboardInterrupt) else 143
        except BrokenPipeError:  # the reader of stdout has closed it, as `head` does
            _abandon_stdout()
            return 1
        except OSError as error:
            if refused := not_permitted(error):
                return _refuse(options.command, refused, error)
            if error.errno not in NO_ROOM:
                raise
            if error.filename is None:
                _abandon_stdout()
            return _refuse(options.command, f"{error.filename or 'stdout'}: {error.strerror}", error)
    return 0


def _command(options: argparse.Namespace) -> Callable[[], None]:
    """What the command does. Only its own modules are imported: torch and transformers take seconds."""
    match options.command:
        case "init":
            from dparallel.cli.init import init

            return partial(init, options.file, options.source)
        case "generate":
            from dparallel.cli.generate import generate

            return partial(generate, options)
        case "chat":
            from dparallel.cli.chat import chat

            return partial(chat, options)
        case "serve":
            from dparallel.cli.serve import serve

            return partial(serve, options)
        case "fit-rule":
            from dparallel.cli.fit_rule import fit_rule

            return partial(fit_rule, options)
        case "plan":
            from dparallel.cli.plan import print_plan

            return partial(print_plan, options.config, options.set, options.gpu_memory, options.rate)
        case "eval":
            from dparallel.cli.eval import evaluate

            return partial(evaluate, options)
        case "compare":
            from dparallel.cli.compare import print_comparison

            return partial(print_comparison, options.given, options.runs, options.out)
        case "export":
            from dparallel.cli.export import export

            return partial(export, options)
        case "merge":
            from dparallel.cli.merge import merge

            return partial(merge, options)
        case "runs":
            from dparallel.cli.runs import print_runs

            return partial(print_runs, options.runs, options.json)
        case _:
            from dparallel.cli.clean import clean

            return partial(clean, options.given, options.runs, options.keep, options.checkpoints, options.yes)


def _refuse(command: str, message: str, error: BaseException, arguments: Sequence[str] = ()) -> int:
    line = "; ".join([message, *_notes(error)])
    if command in DECODING_COMMANDS:
        from dparallel.cli.again import corrected

        line = in_flags(line)
        if fitting := corrected(arguments, error):
            line = f"{line}; this fits: {fitting}"
    print(f"dparallel {command}: error: {' '.join(line.split())}", file=sys.stderr)
    return 2


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


@contextmanager
def _termination_raised() -> Iterator[None]:
    """Raise an exception on SIGTERM, as on Ctrl-C, so that commands can report what is saved."""
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


@contextmanager
def _threads_said() -> Iterator[None]:
    """Show on stderr how many threads are used, and why."""
    log, handler = logging.getLogger(THREADS), logging.StreamHandler(sys.stderr)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _abandon_stdout() -> None:
    """Discard buffered output, which Python would otherwise try to write again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
