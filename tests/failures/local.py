"""Stages as commands, each in a process group of its own, as a terminal starts them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tests.failures.zygote import Forked, Zygote

CASE = "DPARALLEL_FAILURE_CASE"  # variable that tells the processes of a case from all others
SECONDS = 240.0  # for what takes seconds on an idle machine, and minutes on a busy one
SIGNALS = {signal.SIGKILL: "SIGKILL", signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


def wait_until(is_so: Callable[[], bool], what: Callable[[], str], seconds: float = SECONDS) -> None:
    """Wait for something; the message of the failure is made when it is due."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, what()
        time.sleep(0.002)


def waits(said: str) -> bool:
    """Whether a command says that it waits for another one that makes the same stage."""
    return "is in use by process" in said and "waiting for its result" in said


class Command:
    """A command in progress, with all the processes that it starts.

    Args:
        arguments: of `python -m`; the first one is the module.
        zygote: forks the process; by default Python is started.
    """

    def __init__(
        self,
        arguments: list[str],
        folder: Path,
        environment: dict[str, str],
        zygote: Zygote | None = None,
    ):
        self.name = f"{folder.name}-{time.monotonic_ns()}"
        self.output = folder / f"{self.name}.log"
        env = {**os.environ, **environment, CASE: self.name}
        self.process: subprocess.Popen[bytes] | Forked
        if zygote is not None:
            self.output.touch()
            self.process = zygote.start(arguments, folder, env, self.output)
            return
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")

    @property
    def last(self) -> str:
        """The last line of the output."""
        return self.said.splitlines()[-1]

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Wait for something while the command runs."""
        wait_until(lambda: is_so() or self.process.poll() is not None, lambda: self.said)
        assert is_so(), self.said

    def wait_for(self, text: str) -> None:
        """Wait until the command says something."""
        self.wait_until(lambda: text in self.said)

    def signal(self, number: int) -> None:
        """Send a signal: SIGINT to the whole process group, as a terminal does, others to one process."""
        if number == signal.SIGINT:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def send_all(self, number: int) -> None:
        """Send a signal to every process of the command."""
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)

    def code(self, seconds: float = SECONDS) -> int:
        """Wait for the end; the exit code."""
        end = time.monotonic() + seconds
        while (code := self.process.poll()) is None:
            assert time.monotonic() < end, f"still running after {seconds:.0f} s:\n{self.said}"
            time.sleep(0.01)
        return code

    def family(self) -> list[psutil.Process]:
        """The processes of the command that are alive."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                # What was forked shows the environment of the process that forked it.
                ours = os.getsid(process.pid) == self.process.pid or process.environ().get(CASE) == self.name
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def leaves_no_process(self, seconds: float = 15.0) -> bool:
        """Whether all processes have ended after some seconds."""
        psutil.wait_procs(self.family(), timeout=seconds)
        return self.family() == []


@contextlib.contextmanager
def running(
    arguments: list[str], folder: Path, environment: dict[str, str], zygote: Zygote | None = None
) -> Iterator[Command]:
    """A command, of which nothing is left in the end."""
    command = Command(arguments, folder, environment, zygote)
    try:
        yield command
    finally:
        for process in command.family():
            with contextlib.suppress(psutil.Error):
                process.kill()
        command.code()
