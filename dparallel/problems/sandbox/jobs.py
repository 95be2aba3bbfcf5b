"""What is run in the sandbox and what comes back; plain data."""

import math
from dataclasses import dataclass, field
from typing import Literal

from dparallel.config.base import UserError

Mode = Literal["bubblewrap", "unshare"]
MODES: tuple[Mode, ...] = ("bubblewrap", "unshare")
WEAKER: tuple[Mode, ...] = ("unshare",)  # used only when asked for; named in every note


class SandboxError(UserError):
    """Generated code cannot be run safely here; the message names what is missing and the remedy."""


@dataclass(frozen=True)
class Limits:
    """What one candidate may use; also the limits of the process that tests it.

    Attributes:
        seconds: CPU time of each process, so that a verdict does not depend on how busy the machine is; in
            whole seconds, rounded up.
        wall: seconds from the moment both processes are ready to the verdict, not counting the time in which
            they wait for a CPU (`Patience`). A candidate that sleeps uses them up.
        memory: bytes of address space of each process. A candidate cannot start further processes, so this
            is also the limit of all it uses.
        disk: bytes of the private `/tmp`, and of any single file.
        entries: files, folders and links in `/tmp`, which take memory even if they are empty.
        threads: threads of each process at a time, the first one included.
        files: open file descriptors of each process.
        message: bytes of one argument list or one result.
    """

    seconds: float = 10.0
    wall: float = 60.0
    memory: int = 512 << 20
    disk: int = 16 << 20
    entries: int = 1000
    threads: int = 8
    files: int = 64
    message: int = 16 << 20

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if not least <= value < math.inf:
                raise SandboxError(f"limits.{name}={value!r}: give a number of at least {least}")


LEAST = {
    "seconds": 0.01,
    "wall": 0.01,
    "memory": 64 << 20,
    "disk": 4096,
    "entries": 1,
    "threads": 1,
    "files": 16,
    "message": 1024,
}


@dataclass(frozen=True)
class Job:
    """A candidate program and its tests.

    Attributes:
        candidate: the program, Python source. Its `if __name__ == "__main__"` blocks are not run.
        tests: Python source that raises if the candidate is wrong. It runs in a process of its own. Names
            that neither the tests nor `trusted` define, and that are neither builtins nor modules of the
            standard library, are the candidate's.
        trusted: Python source that is not the candidate's and whose names the tests use, such as the helper
            functions in a HumanEval prompt.
        entry_points: names that are the candidate's in any case: a HumanEval prompt begins its entry point,
            and an MBPP solution may be called `sum`.
    """

    candidate: str
    tests: str
    trusted: str = ""
    entry_points: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if isinstance(self.entry_points, str):
            raise SandboxError(f"entry_points={self.entry_points!r}: give a tuple of names")


@dataclass(frozen=True)
class Outcome:
    """The verdict about one candidate.

    Attributes:
        passed: whether all tests passed; None if this machine was too busy to tell.
        note: one line: `passed`, or what went wrong first. In a weaker mode it starts with the mode's name.
        seconds: wall time from the moment both processes are ready to the verdict.
        mode: how the code was confined.
    """

    passed: bool | None
    note: str
    seconds: float
    mode: Mode
