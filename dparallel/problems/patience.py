"""How long processes may take on a machine that others use, too.

A limit in wall-clock seconds alone would make verdicts depend on the load of the machine. Here the time in
which a process is ready to run but waits for a CPU does not count, nor does the time in which this process
itself was stopped. Sleeping, and waiting for anything else, count: a process that sleeps uses its limit up.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from typing import Literal

MOST = 10  # times its limit of wall-clock time after which a process is given up in any case
LONGEST_TICK = 1.0  # seconds between two looks at processes
NANOSECONDS = 1e9

State = Literal["going", "over", "lost"]


class Patience:
    """The time that processes and their descendants have had of `seconds`, beginning now.

    Linux counts for every thread how long it ran and how long it waited for a CPU (`/proc/PID/schedstat`, see
    Documentation/scheduler/sched-stats.rst); in what does not (gVisor), all time counts.

    Attributes:
        used: seconds of CPU time.
        counted: seconds that count.
        next: when to look again, on the clock `time.monotonic`.
        state: `over` when the processes have had their time. `lost` when the wall-clock time is `MOST` times
            as long while they hardly ran: the machine is too busy to tell. Otherwise `going`.
    """

    def __init__(self, processes: Sequence[int], seconds: float):
        self.processes, self.seconds = processes, seconds
        self.used, self.counted, self._passed = 0.0, 0.0, 0.0
        self._tick = min(LONGEST_TICK, seconds)
        self._seen = dict(_threads(processes))
        self._looked = time.monotonic()
        self.next = self._looked + self._tick
        self.state: State = "going"

    def look(self) -> State:
        """Add the time since the last look, and return the new state."""
        now = time.monotonic()
        passed = min(now - self._looked, 2 * self._tick)  # longer if this process was stopped
        self._looked = now
        waited = 0.0
        for thread, (ran, waiting) in _threads(self.processes):
            ran_before, waited_before = self._seen.get(thread, (0.0, 0.0))
            self.used += max(ran - ran_before, 0.0)
            waited += max(waiting - waited_before, 0.0)
            self._seen[thread] = ran, waiting
        self._passed += passed
        self.counted += passed - min(waited, passed)
        left = max(self.seconds - self.counted, 0.0)
        self.next = now + min(max(left, 0.01), self._tick)
        if not left:
            self.state = "over"
        elif self._passed >= MOST * self.seconds:  # its own threads may have kept it waiting
            self.state = "over" if self.used >= self.seconds else "lost"
        return self.state


def _threads(processes: Sequence[int]) -> Iterator[tuple[int, tuple[float, float]]]:
    """Numbers of all threads of processes and their descendants; seconds that each ran and waited."""
    left = list(processes)
    while left:
        process = left.pop()
        try:
            threads = os.listdir(f"/proc/{process}/task")
        except OSError:  # it has ended, or this is not Linux
            continue
        for thread in threads:
            with contextlib.suppress(OSError, ValueError):
                ran, waited = _read(f"/proc/{process}/task/{thread}/schedstat").split()[:2]
                yield int(thread), (int(ran) / NANOSECONDS, int(waited) / NANOSECONDS)
            with contextlib.suppress(OSError):
                left += map(int, _read(f"/proc/{process}/task/{thread}/children").split())


def _read(file: str) -> str:
    with open(file, encoding="ascii") as opened:
        return opened.read()
