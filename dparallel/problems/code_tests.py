"""HumanEval and MBPP: what is run in the sandbox to judge a response."""

import ast
import builtins
import os
import platform
import re
import sys
from typing import Any

from dparallel.problems.programs import program, statements
from dparallel.problems.pruning import defined
from dparallel.problems.sandbox.jobs import MODES, Job, Mode, SandboxError
from dparallel.problems.sandbox.run import check_sandbox
from dparallel.problems.sources import Problem

MODE_VARIABLE = "DPARALLEL_SANDBOX"
MOST_PARTS = 10  # between marks, that are searched for a program
_MARKS = re.compile(r"\[(?:BEGIN|DONE)\]")


def humaneval_job(problem: Problem, response: str) -> Job:
    """The program of a response to a HumanEval problem, and its tests.

    The response may hold the whole function or continue the prompt; imports and helpers of the prompt that
    it leaves out are added.
    """
    prompt, entry_point, test = (problem.extra[key] for key in ("prompt", "entry_point", "test"))
    candidate = program(problem.prefill + response, [entry_point], _names(test), prompt)
    return Job(candidate, f"{test}\ncheck({entry_point})\n", trusted=prompt, entry_points=(entry_point,))


def mbpp_job(problem: Problem, response: str) -> Job:
    """The program of a response to an MBPP problem, and its tests.

    The program is looked for between the marks `[BEGIN]` and `[DONE]`, any of which may be missing, since the
    prompt may end in the first one: the first part that defines what the tests use counts.
    """
    entry_points = mbpp_entry_points(problem)
    parts = _MARKS.split(problem.prefill + response)
    candidates = [program(part, entry_points) for part in parts[:MOST_PARTS] if part.strip()] or [""]
    whole = [found for found in candidates if entry_points <= defined(statements(found))]
    candidate = next(iter(whole), candidates[0])
    return Job(candidate, _mbpp_tests(problem), entry_points=tuple(sorted(entry_points)))


def mbpp_entry_points(problem: Problem) -> set[str]:
    """Names that the tests of an MBPP problem take from the program.

    Names that the tests define, builtins and modules of the standard library are not, unless the reference
    defines them: a solution may be called `sum`.
    """
    tests = statements(_mbpp_tests(problem))
    names = _names(_mbpp_tests(problem)) - defined(tests)
    library = {*dir(builtins), *sys.stdlib_module_names}
    return names & (defined(statements(problem.reference or "")) | (names - library))


def _mbpp_tests(problem: Problem) -> str:
    return "\n".join([problem.extra.get("test_setup_code") or "", *problem.extra["test_list"], ""])


def _names(source: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}


def humaneval_misfit(problem: Problem) -> str | None:
    """Why no response to a problem can be judged by `humaneval_job`; None if there is no such reason."""
    for key in ("prompt", "entry_point", "test"):
        if not _is_source(problem.extra.get(key)):
            return f"needs protocol.extra: [prompt, entry_point, test], Python texts, but {key!r} is none"
    return None


def mbpp_misfit(problem: Problem) -> str | None:
    """Why no response to a problem can be judged by `mbpp_job`; None if there is no such reason."""
    tests, setup = problem.extra.get("test_list"), problem.extra.get("test_setup_code") or ""
    if not isinstance(tests, list) or not tests or not all(map(_is_source, [*tests, setup])):
        return "needs protocol.extra: [test_list, test_setup_code], a list of Python texts and a text"
    if not mbpp_entry_points(problem):
        return f"runs the tests in test_list, but these use nothing of the program: {tests[0]!r}"
    return None


def _is_source(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        ast.parse(value)
    except (SyntaxError, ValueError):
        return False
    return True


def prepare_sandbox() -> None:
    """Check that generated code can be run on this machine.

    Raises:
        SandboxError: names what is missing, and the remedy.
    """
    check_sandbox(sandbox_mode())


def environment() -> str:
    """What decides verdicts on this machine besides the code: the kind of sandbox, and Python's version."""
    return f"{sandbox_mode()}, Python {platform.python_version()}"


def sandbox_mode() -> Mode:
    """How generated code is confined: `bubblewrap`, or what the environment variable DPARALLEL_SANDBOX says.

    Raises:
        SandboxError: the variable names no mode.
    """
    named = os.environ.get(MODE_VARIABLE) or MODES[0]
    for mode in MODES:
        if mode == named:
            return mode
    raise SandboxError(f"{MODE_VARIABLE}={named}: known modes are {', '.join(MODES)}")
