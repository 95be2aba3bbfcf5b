"""Judging in worker processes: what a scorer does wrong costs one sample, and nothing hangs."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

import dparallel
from dparallel.config.base import UserError
from dparallel.config.problems import EMBEDDED, ProblemsConfig, ProtocolConfig
from dparallel.problems import pool
from dparallel.problems.judging import judged, score
from dparallel.problems.registry import load_problems
from dparallel.problems.scorer import Scorer, Verdict
from dparallel.problems.scoring import SCORERS, check_scorable
from dparallel.problems.sources import Problem
from dparallel.problems.worker import NOTE_LENGTH
from dparallel.stages import progress
from tests.dparallel.problems import hostile
from tests.dparallel.problems.hostile import IN_PROCESS, IN_PROCESSES
from tests.dparallel.problems.sandbox.hosts import BUBBLEWRAP

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def no_worker_is_left() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))  # such as the server of other tests
    yield
    assert not set(psutil.Process().children(recursive=True)) - before


@pytest.fixture(autouse=True)
def two_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


def verdicts(scorer: Scorer, responses: list[str]) -> list[Verdict]:
    problems = [Problem(str(row), "s", "1 + 1?", reference="2") for row in range(len(responses))]
    found = dict(judged(scorer, problems, responses))
    return [found[row] for row in range(len(responses))]


def wrong(note: str) -> Verdict:
    return Verdict({"right": False}, note)


RIGHT = Verdict({"right": True})
# Repeated, they are long texts that a regular expression could try in many ways.
BOXES = r"1, 1. 1,000 -1 $1 \boxed{ \boxed \fbox{1} \frac{ \frac1 \text{ \, \! ^{\circ} coins"
PIECES = (
    *"1-.,$#\\{}()x/\n \u0661\0",
    *BOXES.split(),
    "#### ",
    "#### 1",
    "The answer is ",
    "The answer is 1",
    "1 000",
    "1 1/1",
    "= ",
    "- ",
)


def test_every_failure_costs_one_sample(caplog: pytest.LogCaptureFixture) -> None:
    cases = {
        "hang": wrong("timed out after 1 s"),  # the second time
        "spin": wrong("timed out after 0.5 s"),
        "die 0": wrong("the process that judged it ended (exit code 0)"),
        "die 7": wrong("the process that judged it ended (exit code 7)"),
        "crash": wrong("the process that judged it ended (SIGSEGV)"),
        "exit": wrong("SystemExit: enough"),
        "raise": wrong("AssertionError: 1 == 2"),
        "interrupt": wrong("KeyboardInterrupt"),
        "swallow": wrong("MemoryError"),
        "print": Verdict({"right": False}),
        "explain": wrong("z" * NOTE_LENGTH),
        "": Verdict({"right": False}),
    }
    responses = [text for case in cases for text in (case, "2")]
    began = time.monotonic()
    found = verdicts(IN_PROCESSES, responses)
    assert time.monotonic() - began < 60
    assert dict(zip(responses[::2], found[::2], strict=True)) == cases
    assert found[1::2] == [RIGHT] * len(cases), "their neighbours are not affected"
    assert "hostile failed on 9 of 24 responses, which count as wrong" in caplog.text


def test_workers_are_few_live_long_and_import_no_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "TOLD_EVERY", 0.0)
    with caplog.at_level("INFO"):
        found = verdicts(IN_PROCESSES, ["modules"] * 20)
    assert "hostile: judged 1 of 20 responses, " in caplog.text
    assert [verdict.metrics for verdict in found] == [{"right": True}] * 20
    assert len({verdict.note for verdict in found}) <= 2


def test_a_scorer_in_this_process_that_raises_costs_one_sample(caplog: pytest.LogCaptureFixture) -> None:
    assert verdicts(IN_PROCESS, ["2", "raise", "explain"]) == [
        RIGHT,
        wrong("AssertionError: 1 == 2"),
        wrong("z" * NOTE_LENGTH),
    ]
    assert "hostile failed on one of 3 responses" in caplog.text


@pytest.mark.parametrize("scorer", [IN_PROCESS, IN_PROCESSES])
def test_a_machine_that_cannot_judge_is_no_wrong_answer(scorer: Scorer) -> None:
    with pytest.raises(UserError, match="^no sandbox: install bubblewrap$"):
        verdicts(scorer, ["refuse", "2"])


def test_what_a_scorer_lacks_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = replace(IN_PROCESSES, prepare=hostile.lacking)
    with pytest.raises(UserError, match="^math-verify is not installed: pip install math-verify$"):
        verdicts(lacking, ["2"])
    monkeypatch.setitem(SCORERS, "hostile", lacking)
    with pytest.raises(UserError, match="^math-verify is not installed"):
        check_scorable([], ProtocolConfig(scorers=("hostile",)))


def test_a_worker_that_cannot_start_ends_the_judging() -> None:
    with pytest.raises(RuntimeError, match="could not be started: ImportError: no such library"):
        verdicts(replace(IN_PROCESSES, prepare=hostile.broken), ["2"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("more", r"gives the metrics \['right', 'left'\], expected \['right'\]"),
        ("less", r"gives the metrics \[\], expected \['right'\]"),
        ("another", r"gives the metrics \['left'\], expected \['right'\]"),
        ("nan", r"gives nan \(of type float\) for the metric 'right': give True or False, or None"),
        ("one", r"gives 1 \(of type int\) for the metric 'right'"),
        ("text", r"gives 'False' \(of type str\) for the metric 'right'"),
        ("numpy", r"gives .*True.* \(of type bool.?\) for the metric 'right'"),
        ("list", ".*: give a Verdict with a dict of metrics"),
        ("bool", "gives True: give a Verdict with a dict of metrics"),
        ("nothing", "gives None: give a Verdict with a dict of metrics"),
        ("note", "gives the note 3: give a text or None"),
    ],
)
def test_what_is_no_verdict_ends_the_judging(given: str, message: str) -> None:
    for scorer in [IN_PROCESS] + [IN_PROCESSES] * (given == "nan"):
        with pytest.raises(UserError, match=f"^scorer 'hostile' {message}"):
            verdicts(scorer, ["2", f"give {given}"])


@pytest.mark.parametrize("in_process", [True, False])
def test_a_scorer_gives_a_verdict_for_each_response(in_process: bool) -> None:
    gives: list[tuple[Any, str]] = [
        (lambda problems, responses: [], "gives 0 verdicts for"),
        (lambda problems, responses: [RIGHT] * 9, "gives 9 verdicts for"),
        (lambda problems, responses: None, "gives None for"),
    ]
    for score_all, message in gives:
        with pytest.raises(UserError, match=f"^scorer 'hostile' {message} . responses: one each"):
            verdicts(replace(IN_PROCESS, score=score_all, in_process=in_process), ["2", "3"])


@pytest.mark.parametrize(
    ("wanting", "message"),
    [
        ({"metrics": ()}, "at least one"),
        ({"metrics": "right"}, "give a tuple of names"),
        ({"metrics": ("right", "right")}, "give different names"),
        ({"metrics": ("note",)}, "none of row, problem_id, prompt, reference, response, note"),
        ({"seconds": 0}, "seconds=0: give a positive number"),
        ({"seconds": float("nan")}, "seconds=nan"),
        ({"seconds": float("inf")}, "seconds=inf"),
    ],
)
def test_scorers_that_cannot_work_are_refused(wanting: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^scorer 'hostile': .*{message}"):
        replace(IN_PROCESSES, **wanting)


def test_a_registered_scorer_judges_in_worker_processes() -> None:
    """The default, since nothing is known about it."""
    assert not Scorer("mine", 1, ("right",), hostile.each).in_process
    here = {name for name, scorer in SCORERS.items() if scorer.in_process}
    assert here == {"exact", "flexible_extract", "strict_match", "strict_match_cot", "boxed", *EMBEDDED}


@pytest.mark.parametrize("length", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [name for name, scorer in SCORERS.items() if scorer.in_process])
def test_scorers_in_this_process_take_linear_time(name: str, length: int) -> None:
    endings = ("", "x", "}" * length)
    scorer = SCORERS[name]
    config = ProblemsConfig(benchmark=name if name in EMBEDDED else "coins", count=1)
    problem = replace(load_problems(config)[0], reference="#### 18")
    for piece in PIECES:
        for before in ("", {"boxed": "\\boxed{", "strict_match_cot": "The answer is "}.get(name, "#### ")):
            text = before + piece * (length // len(piece))
            began = time.process_time()
            found = scorer.checked(scorer.score([problem] * 3, [text + end for end in endings]), 3)
            assert time.process_time() - began < 2.0, (piece, before)
            assert not any(verdict.metrics[scorer.metrics[0]] for verdict in found), (piece, before)


def test_scorers_of_a_script_and_closures_work() -> None:
    expected = "2"

    def inner(problems: Any, responses: Any) -> list[Verdict]:
        return [Verdict({"right": response == expected}) for response in responses]

    space: dict[str, Any] = {"__name__": "__main__", "Verdict": Verdict}
    exec(
        "LIMIT = 2\n"
        "def helper(response): return int(response) == LIMIT\n"
        "def mine(problems, responses): return [Verdict({'right': helper(text)}) for text in responses]",
        space,
    )
    scores: list[Any] = [inner, space["mine"], lambda problems, responses: inner(problems, responses)]
    for score_one in scores:
        assert verdicts(replace(IN_PROCESSES, score=score_one), ["2"]) == [RIGHT]


@pytest.mark.slow  # imports torch
def test_scorers_may_use_the_public_names_of_the_package() -> None:
    def inner(problems: Any, responses: Any) -> list[Verdict]:
        return [Verdict({"right": "entropy" in dparallel.RULES})]

    assert verdicts(replace(IN_PROCESSES, score=inner, seconds=60), ["2"]) == [RIGHT]


def test_scorers_that_cannot_be_sent_to_workers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lock, weights = threading.Lock(), bytes(1000)
    monkeypatch.setattr(pool, "LARGEST_SETUP", 1000)
    inners: list[tuple[Any, str]] = [
        (lambda problems, responses: lock, "cannot be sent to worker processes .TypeError: cannot pickle"),
        (lambda problems, responses: weights, "refers to 0 MiB of variables, and at most 0 MiB"),
    ]
    for inner, message in inners:
        with pytest.raises(UserError, match=f"^a function {message}.*: put it into a module"):
            verdicts(replace(IN_PROCESSES, score=inner), ["2"])
    module = ModuleType("made_here")
    exec("def each(problems, responses): return []", module.__dict__)
    monkeypatch.setitem(sys.modules, "made_here", module)
    with pytest.raises(UserError, match="worker processes cannot import a function .*named 'made_here'"):
        verdicts(replace(IN_PROCESSES, score=module.each), ["2"])


def test_a_busy_machine_gives_no_verdict() -> None:
    problems = [Problem(str(row), "s", "1 + 1?", reference="2") for row in range(3)]
    found, message = [], r"^hostile has no verdict on 1 of 3 responses \(problem 1: the sandbox had"
    with pytest.raises(UserError, match=message):
        found += judged(IN_PROCESSES, problems, ["2", "busy", "2"])
    assert sorted(found, key=lambda pair: pair[0]) == [(0, RIGHT), (2, RIGHT)]


def test_a_killed_worker_takes_its_children_along(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    assert verdicts(IN_PROCESSES, [f"child {file}"]) == [wrong("timed out after 1 s")]
    assert ended(int(file.read_text(encoding="utf-8")))


def test_a_worker_that_writes_into_its_replies_costs_one_sample() -> None:
    assert verdicts(IN_PROCESSES, ["babble", "2"]) == [
        wrong("no proper reply of the process that judged it"),
        RIGHT,
    ]


def test_a_worker_that_was_lost_once_costs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As if the machine had been out of memory for a moment."""
    assert verdicts(IN_PROCESSES, [f"stumble {tmp_path / 'mark'}", "2"]) == [RIGHT, RIGHT]
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_whoever_stops_early_ends_the_workers() -> None:
    problems = [Problem(str(row), "s", "1 + 1?", reference="2") for row in range(3)]
    with contextlib.closing(judged(IN_PROCESSES, problems, ["2", "hang", "hang"])) as going:
        assert next(going) == (0, RIGHT)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_ended_run_leaves_no_worker(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C, or a kill, while a scorer hangs."""
    program = f"""
import sys
from dparallel_worker import _enter
_enter({str(ROOT / "dparallel")!r})  # without torch, for speed
from dataclasses import replace
from dparallel.problems.judging import judged
from dparallel.problems.sources import Problem
from tests.dparallel.problems.hostile import IN_PROCESSES
endless = replace(IN_PROCESSES, seconds=600)
list(judged(endless, [Problem("p", "s", "a")], ["hang"]))
"""
    (tmp_path / "dparallel_worker.py").symlink_to(ROOT / "dparallel" / "problems" / "worker.py")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    run = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (workers := psutil.Process(run.pid).children()):
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)  # it asks for the signal of its parent's end first of all
    os.kill(run.pid, number)
    assert run.wait(timeout=30) == -number
    assert len(workers) == 1
    assert ended(workers[0].pid)


def ended(pid: int, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_verdicts_of_several_scorers_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCORERS, "hostile", IN_PROCESSES)
    problem, protocol = (
        Problem("p", "s", "1 + 1?", reference="2"),
        ProtocolConfig(scorers=("exact", "hostile")),
    )
    assert score([problem] * 2, ["2", "raise"], protocol) == [
        Verdict({"exact": True, "right": True}),
        Verdict({"exact": False, "right": False}, "AssertionError: 1 == 2"),
    ]
    assert score([], [], protocol) == []


@pytest.mark.slow
def test_answers_that_cannot_be_computed_time_out() -> None:
    scorer = replace(SCORERS["math_verify"], seconds=2.0)
    responses = [r"It is $\boxed{9^{9^{9^{9}}}}$.", r"It is $\boxed{2}$.", r"It is $\boxed{99999999!}$."]
    late = Verdict({"math_verify": False}, "timed out after 2 s")
    assert verdicts(scorer, responses) == [late, Verdict({"math_verify": True}), late]


@BUBBLEWRAP
def test_generated_code_runs_in_the_sandbox_from_a_worker() -> None:
    extra = {"test_list": ["assert f(1) == 2"], "test_setup_code": ""}
    problems = [Problem(str(row), "s", "", extra=extra) for row in range(2)]
    responses = ["def f(x):\n    return x + 1\n[DONE]", "```python\ndef f(x):\n    return x\n```"]
    assert score(problems, responses, ProtocolConfig(scorers=("mbpp",))) == [
        Verdict({"pass_at_1": True}),
        Verdict({"pass_at_1": False}, "wrong at `assert f(1) == 2`"),
    ]
