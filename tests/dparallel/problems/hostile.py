"""Scorers that fail in every way; what they do is said by the response. Imported by worker processes."""

import contextlib
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from dparallel.config.base import UserError
from dparallel.problems.pool import MachineBusy
from dparallel.problems.scorer import Scorer, Verdict
from dparallel.problems.sources import Problem

GIVEN: dict[str, Any] = {
    "more": Verdict({"right": False, "left": True}),
    "less": Verdict({}),
    "another": Verdict({"left": True}),
    "nan": Verdict({"right": float("nan")}),  # type: ignore[dict-item]
    "one": Verdict({"right": 1}),  # type: ignore[dict-item]
    "text": Verdict({"right": "False"}),  # type: ignore[dict-item]
    "numpy": Verdict({"right": numpy.bool_(True)}),
    "list": Verdict(["right"]),  # type: ignore[arg-type]
    "bool": True,
    "nothing": None,
    "note": Verdict({"right": True}, note=3),  # type: ignore[arg-type]
}


def act(problem: Problem, response: str) -> Verdict:
    match response.split():
        case ["hang"]:
            time.sleep(600)
        case ["spin"]:  # without returning to the interpreter
            sum(range(10**12))
        case ["die", code]:
            os._exit(int(code))
        case ["stumble", file] if not Path(file).exists():  # the first time only
            Path(file).touch()
            os._exit(1)
        case ["stumble", _]:
            return Verdict({"right": True})
        case ["exit"]:
            sys.exit("enough")
        case ["crash"]:
            ctypes.string_at(0)
        case ["raise"]:
            raise AssertionError("1 == 2")
        case ["interrupt"]:
            raise KeyboardInterrupt
        case ["swallow"]:
            bytearray(6 << 30)
        case ["print"]:
            for _ in range(64):
                os.write(1, b"x" * (1 << 20))
                print("y" * (1 << 20), file=sys.stderr)
        case ["babble"]:  # into everything that is open, so also into the socket of the replies
            for descriptor in range(3, 200):
                with contextlib.suppress(OSError):
                    os.write(descriptor, b"\0\0\0\5hello")
        case ["explain"]:
            return Verdict({"right": False}, "z" * (8 << 20))
        case ["give", value]:
            return GIVEN[value]
        case ["busy"]:
            raise MachineBusy("the sandbox had no CPU for an hour")
        case ["refuse"]:
            raise UserError("no sandbox: install bubblewrap")
        case ["child", file]:
            child = subprocess.Popen(["sleep", "600"])
            Path(file).write_text(str(child.pid), encoding="utf-8")
            time.sleep(600)
        case ["modules"]:
            heavy = {"torch", "transformers"} & set(sys.modules)
            return Verdict({"right": not heavy}, f"{os.getpid()} {sorted(heavy)}")
    return Verdict({"right": response == problem.reference})


def each(problems: Sequence[Problem], responses: Sequence[str]) -> list[Verdict]:
    return [act(*pair) for pair in zip(problems, responses, strict=True)]


def by_reference(problems: Sequence[Problem], responses: Sequence[str]) -> list[Verdict]:
    """Does what the reference says; the response counts for nothing."""
    return [act(problem, problem.reference or "") for problem in problems]


def lacking() -> None:
    raise UserError("math-verify is not installed: pip install math-verify")


def broken() -> None:
    raise ImportError("no such library")


IN_PROCESSES = Scorer("hostile", 1, ("right",), each, seconds=0.5)
IN_PROCESS = Scorer("hostile", 1, ("right",), each, in_process=True)
