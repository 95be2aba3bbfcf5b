"""Judging in worker processes: what a scorer does wrong costs one sample, and nothing hangs."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from dparallel.config.base import UserError
from dparallel.config.problems import ProtocolConfig
from dparallel.problems import judging
from dparallel.problems.judging import judged, score
from dparallel.problems.scorer import Scorer, Verdict
from dparallel.problems.scoring import SCORERS, check_scorable
from dparallel.problems.sources import Problem
from dparallel.problems.worker import NOTE_LENGTH
from tests.dparallel.problems import hostile
from tests.dparallel.problems.hostile import IN_PROCESS, IN_PROCESSES
from tests.dparallel.problems.sandbox.hosts import BUBBLEWRAP

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def no_worker_is_left() -> Iterator[None]:
    yield
    assert not psutil.Process().children(recursive=True)


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


def test_every_failure_costs_one_sample(caplog: pytest.LogCaptureFixture) -> None:
    cases = {
        "hang": wrong("timed out after 1 s"),
        "spin": wrong("timed out after 1 s"),
        "die 0": wrong("the process that judged it ended (exit code 0)"),
        "die 7": wrong("the process that judged it ended (exit code 7)"),
        "crash": wrong("the process that judged it ended (SIGSEGV)"),
        "exit": wrong("SystemExit: enough"),
        "raise": wrong("AssertionError: 1 == 2"),
        "interrupt": wrong("KeyboardInterrupt"),
        "swallow": wrong("MemoryError"),
        "print": Verdict({"right": False}),
        "explain": wrong("z" * NOTE_LENGTH),
        "unreadable": wrong("ValueError: the scorer gives the metrics ['right', 'left'], expected ['right']"),
        "": Verdict({"right": False}),
    }
    responses = [text for case in cases for text in (case, "2")]
    began = time.monotonic()
    found = verdicts(IN_PROCESSES, responses)
    assert time.monotonic() - began < 60
    assert dict(zip(responses[::2], found[::2], strict=True)) == cases
    assert found[1::2] == [RIGHT] * len(cases), "their neighbours are not affected"
    assert "hostile failed on 10 of 26 responses, which count as wrong" in caplog.text


def test_workers_are_few_live_long_and_import_no_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(judging, "PROGRESS_SECONDS", 0.0)
    with caplog.at_level("INFO"):
        found = verdicts(IN_PROCESSES, ["modules"] * 20)
    assert "hostile: judged 1/20; about " in caplog.text
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


def test_functions_that_workers_cannot_import_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    inners: list[Any] = [lambda problems, responses: [], functools.partial(lambda: None)]
    for inner in inners:
        with pytest.raises(UserError, match="define the function at the top level of a module"):
            verdicts(replace(IN_PROCESSES, score=inner), ["2"])
    monkeypatch.setattr(sys.modules["__main__"], "each", hostile.each, raising=False)
    monkeypatch.setattr(hostile.each, "__module__", "__main__")
    with pytest.raises(UserError, match="do not run the script .*: define the function at the top level"):
        verdicts(IN_PROCESSES, ["2"])


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
    assert not caplog.text


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
