"""Ctrl-C and SIGTERM of a local run: it ends within seconds, and one line says how to go on.

The first signal raises an exception in the main thread, so that runs are closed and files removed on the way
out. If that takes longer than `SECONDS`, or Ctrl-C is pressed again, the process ends at once; its server and
the training's processes end with it.
"""

import atexit
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

SECONDS = 7.0  # for an orderly end: closing runs, removing files
LAST_SECONDS = 1.0  # for what other libraries do when the program exits, such as sending the last messages
AGAIN_AFTER = 0.5  # seconds; some programs that start others forward a signal that these got already
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def leave_at_once_until_a_run_begins() -> None:
    """In `python -m flows.…`, let Ctrl-C end the program without a traceback while modules are imported."""
    spec = sys.modules["__main__"].__spec__
    is_command = spec is not None and spec.name.startswith("flows.")
    if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave_before_the_run)


def _leave_before_the_run(number: int, frame: FrameType | None) -> NoReturn:
    print("interrupted before anything began", file=sys.stderr, flush=True)
    os._exit(128 + number)


class Interruption:
    """Handles the signals of the process from now on; to be made in the main thread.

    Args:
        say: shows the line that says how to go on.
        mute: called first, so that consequences of the interruption are not shown.
        stage: the name of the stage that is interrupted, if one is.
    """

    def __init__(self, say: Callable[[str], None], mute: Callable[[], None], stage: Callable[[], str | None]):
        self.number: int | None = None  # of the first signal
        self._say, self._mute, self._stage = say, mute, stage
        self._raised = self._over = False
        # The interpreter writes signals there even while the main thread computes in a library.
        self._signals, self._written = socket.socketpair()
        self._written.setblocking(False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as in the background of a script
                signal.signal(number, self._handle)
        signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()
        atexit.register(self._skip_finalization)  # runs after what is registered later

    def leave(self) -> NoReturn:
        """End the program after the run was interrupted."""
        assert self.number is not None
        self._tell()
        last = threading.Timer(LAST_SECONDS, _end, [self.number])
        last.daemon = True
        last.start()
        sys.exit(128 + self.number)

    def over(self) -> None:
        """The run has ended by itself; signals end the program from now on."""
        self._over = True
        for number in SIGNALS:
            if signal.getsignal(number) == self._handle:
                signal.signal(number, signal.SIG_DFL)

    def _skip_finalization(self) -> None:
        """Spare an interrupted run the seconds that the interpreter needs to free its objects."""
        if self.number is not None and not self._over:
            _end(self.number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Raise once in the main thread; Prefect raises its own exception for SIGTERM, then calls this."""
        self.number = self.number or number
        if number == signal.SIGTERM or not self._raised:
            self._raised = True
            raise KeyboardInterrupt

    def _watch(self) -> None:
        """End the process when an orderly end takes too long or is not wanted."""
        deadline: float | None = None
        first = 0.0
        while True:
            self._signals.settimeout(None if deadline is None else max(deadline - time.monotonic(), 0.01))
            try:
                numbers = set(self._signals.recv(64))
            except TimeoutError:
                break
            now = time.monotonic()
            if deadline is None and numbers & set(SIGNALS):
                self.number = self.number or next(iter(numbers & set(SIGNALS)))
                first, deadline = now, now + SECONDS
                self._mute()
            elif signal.SIGINT in numbers and now - first > AGAIN_AFTER:
                break
        if not self._over:
            self._tell()
            _end(self.number or signal.SIGINT)

    def _tell(self) -> None:
        """Show the line that says how to go on, once."""
        said, self._say = self._say, lambda text: None
        stage = self._stage()
        where = f" in {stage}" if stage else ""
        said(f"interrupted{where}: what is done is kept. To go on, give the same command: {same_command()}")


def _end(number: int) -> NoReturn:
    """End the process at once, without the temporary files that its other threads are writing."""
    from dparallel.stages.files import (
        remove_all_partials,
    )  # a run has imported it; before one it takes a second

    remove_all_partials()
    os._exit(128 + number)


def same_command() -> str:
    """The command line of this program."""
    spec = sys.modules["__main__"].__spec__
    name = f"python -m {spec.name}" if spec is not None else f"python {sys.argv[0]}"
    return " ".join([name, *map(shlex.quote, sys.argv[1:])])
