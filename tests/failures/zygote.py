"""Starts `python -m MODULE` with all imports done, which otherwise take most of a case's time.

Each is a process and a session of its own, forked from this one. Requests and answers are lines of JSON.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any


class Zygote:
    """The process that forks, seen from the tests."""

    def __init__(self, environment: dict[str, str]):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.failures.zygote"],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self, arguments: list[str], folder: Path, environment: dict[str, str], output: Path
    ) -> "Forked":
        """Start `python -m` with these arguments, the first of which is the module."""
        asked = {"arguments": arguments, "folder": str(folder), "environment": environment}
        return Forked(self, self.ask(**asked, output=str(output)))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()


class Forked:
    """A forked process, with the part of `subprocess.Popen` that is used here."""

    def __init__(self, zygote: Zygote, pid: int):
        self.pid = pid
        self._zygote = zygote
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative if a signal ended it; None while it runs."""
        if self._code is None:
            self._code = self._zygote.ask(poll=self.pid)
        return self._code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def serve() -> dict[str, Any] | None:
    """Answer requests; returns a request in the process that was forked for it, and None in the end."""
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = None if pid == 0 else os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                return request
        print(json.dumps(answer), flush=True)
    return None


def become(request: dict[str, Any]) -> None:
    """Take on folder, environment, output and arguments of a request."""
    os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, number in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, number)
    sys.argv = ["", *request["arguments"][1:]]
    # As Python finds a module that it is started with, not one that is imported already.
    warnings.filterwarnings("ignore", message=".*found in sys.modules after import of package")


if __name__ == "__main__":
    import flows.benchmark
    import flows.command
    import flows.distill
    import flows.training  # noqa: F401

    if (asked := serve()) is not None:
        become(asked)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        runpy.run_module(asked["arguments"][0], run_name="__main__", alter_sys=True)
