"""Which log messages a flow shows, and where: all in the flow run's log, few on the terminal."""

import logging
import os
import re
import time
from typing import TextIO

import httpx
from prefect.logging.handlers import APILogHandler, PrefectConsoleHandler

from dparallel.config.base import UserError
from dparallel.stages.progress import LEFT

SECONDS = 20.0  # between two lines of progress where they are not written over each other
PROGRESS = re.compile(rf"{LEFT}$")  # how a message ends that only says how far a stage is
PREFECTS_LAST = "Finished in state "  # repeats the error of a failed run
STAGE = "stage"  # attribute of the message with which a stage begins: its name


def send_to_the_run() -> None:
    """Send the library's log messages to the flow run's log."""
    log = logging.getLogger("dparallel")
    log.setLevel(logging.INFO)
    if not any(isinstance(handler, APILogHandler) for handler in log.handlers):
        handler = APILogHandler()
        handler.addFilter(ThinOut())
        log.addHandler(handler)


def show_on(stream: TextIO, everything: bool = False) -> "Terminal":
    """Show messages of a local run on `stream`, in place of Prefect's own output.

    Args:
        everything: show all messages, one below the other.
    """
    terminal = Terminal(stream, everything)
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, PrefectConsoleHandler | Terminal):
            root.removeHandler(handler)
    root.addHandler(terminal)
    return terminal


class Terminal(logging.Handler):
    """Shows warnings, results of stages, and one line of progress, which is written over on a terminal.

    Tracebacks of users' errors, and of a server that does not answer, are not shown: the flow ends with their
    message.
    """

    def __init__(self, stream: TextIO, everything: bool = False):
        super().__init__()
        self.stage: str | None = None  # that is being worked on
        self._stream = stream
        self._everything = everything
        self._in_place = stream.isatty() and not everything
        self._thin = ThinOut(0.0 if self._in_place else SECONDS)
        self._muted = False
        if everything:
            self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))

    def mute(self) -> None:
        """Show no further messages: what follows an interruption is only its consequence."""
        self._muted = True

    def say(self, text: str) -> None:
        """Show a line, in place of the line of progress."""
        self.acquire()
        try:
            self._write(text, stays=True)
        finally:
            self.release()

    def emit(self, record: logging.LogRecord) -> None:
        """Show a message if it is one of those to be shown."""
        text = record.getMessage()
        self.stage = getattr(record, STAGE, self.stage)
        if self._muted:
            return
        if self._everything:
            self._write(self.format(record), stays=True)
            return
        if not is_not_told_at_the_end(record) or text.startswith(PREFECTS_LAST):
            return
        if record.levelno > logging.INFO:
            if record.exc_info:
                text = f"{text}\n{logging.Formatter().formatException(record.exc_info)}"
            self._write(f"{record.levelname.lower()}: {text}", stays=True)
        elif is_progress(record):
            if self._thin.filter(record):
                self._write(f"{self.stage}: {text}" if self.stage else text, stays=False)
        elif hasattr(record, STAGE) and (self._in_place or self.stage is None):
            self._write(text, stays=self.stage is None)

    def _write(self, text: str, stays: bool) -> None:
        """Write a line; a terminal that was closed meanwhile ends the output, not the run."""
        try:
            self._try_to_write(text, stays)
        except (OSError, ValueError):
            self._muted = True

    def _try_to_write(self, text: str, stays: bool) -> None:
        if self._in_place:
            width = 0 if stays else _columns(self._stream)  # a line that wraps cannot be written over
            shown = f"{text[: width - 4]}..." if 4 < width <= len(text) else text
            self._stream.write(f"\r\N{ESCAPE}[K{shown}" + ("\n" if stays else ""))
        else:
            self._stream.write(f"{time.strftime('%H:%M:%S')} {text}\n")
        self._stream.flush()


def _columns(stream: TextIO) -> int:
    """Width of a terminal; 0 where it is not known."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 0


def is_progress(record: logging.LogRecord) -> bool:
    """Whether a message only says how far a stage is."""
    return record.levelno <= logging.INFO and PROGRESS.search(record.getMessage()) is not None


def is_not_told_at_the_end(record: logging.LogRecord) -> bool:
    """Whether a message comes without the traceback of an error that the last line of the run tells."""
    return not record.exc_info or not isinstance(record.exc_info[1], UserError | httpx.RequestError)


class ThinOut(logging.Filter):
    """Drops a message of progress that follows another one within `SECONDS`."""

    def __init__(self, seconds: float = SECONDS):
        super().__init__()
        self.seconds = seconds
        self._passed_at = -seconds

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the message is passed on."""
        if not is_progress(record):
            return True
        now = time.monotonic()
        if now - self._passed_at < self.seconds:
            return False
        self._passed_at = now
        return True
