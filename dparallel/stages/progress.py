"""How far a piece of work is: an estimate of the time left, in log messages that end with it."""

import logging
import time
from collections import deque
from collections.abc import Callable

LEFT = " left"  # how these messages end; where they are shown, each takes the place of the one before
TOLD_EVERY = 1.0  # seconds


class Progress:
    """Logs how far a piece of work is, at most every `TOLD_EVERY` seconds and at the end.

    Args:
        total: the amount of work in any unit; it may change while the work goes on.
        done: how much of it was done before; it is no part of the rate.
    """

    def __init__(
        self,
        log: logging.Logger,
        total: float,
        done: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.total = total
        self._log = log
        self._clock = clock
        self._began = self._told = clock()
        self._marks = deque([(self._began, done)])

    def tell(self, done: float, message: str) -> None:
        """Log `message` and the time left when `done` of the work is done."""
        left, now = self.seconds_left(done), self._clock()
        if now - self._told >= TOLD_EVERY or done >= self.total:
            self._told = now
            self._log.info("%s, %s%s", message, duration(left), LEFT)

    def seconds_left(self, done: float) -> float:
        """Seconds that the rest takes at the rate of the latest half of the time.

        The first piece of work often takes longer (compilers, caches), and pieces differ.
        """
        now = self._clock()
        self._marks.append((now, done))
        while len(self._marks) > 2 and self._marks[1][0] <= (self._began + now) / 2:
            self._marks.popleft()
        then, done_then = self._marks[0]
        rate = (done - done_then) / max(now - then, 1e-9)
        return max(self.total - done, 0.0) / rate if rate > 0 else 0.0


def duration(seconds: float) -> str:
    """`m:ss`, or `h:mm:ss` from an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
