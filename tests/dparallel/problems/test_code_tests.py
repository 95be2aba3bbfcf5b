from typing import Any

import pytest

from dparallel.problems.code_tests import (
    MODE_VARIABLE,
    humaneval_job,
    humaneval_misfit,
    mbpp_entry_points,
    mbpp_job,
    mbpp_misfit,
    sandbox_mode,
)
from dparallel.problems.sandbox.jobs import SandboxError
from dparallel.problems.sandbox.run import run_all
from dparallel.problems.sources import Problem
from tests.dparallel.problems.rows import rows
from tests.dparallel.problems.sandbox.hosts import BUBBLEWRAP


def humaneval_problem(row: dict[str, Any], prefill: str = "") -> Problem:
    extra = {key: row[key] for key in ("prompt", "entry_point", "test")}
    return Problem(row["task_id"], "s", row["prompt"], prefill, row["canonical_solution"], extra)


def mbpp_problem(row: dict[str, Any], prefill: str = "") -> Problem:
    extra = {key: row[key] for key in ("test_list", "test_setup_code")}
    return Problem(str(row["task_id"]), "s", row["text"], prefill, row["code"], extra)


HUMANEVAL = {row["task_id"].removeprefix("HumanEval/"): row for row in rows("humaneval")}
MBPP = {row["task_id"]: row for row in rows("mbpp")}
DREAM = "Here is the completed function:\n```python\n"


@BUBBLEWRAP
def test_reference_solutions_pass_their_tests_and_others_do_not() -> None:
    jobs = []
    for row in HUMANEVAL.values():
        plain = humaneval_problem(row)
        begun = humaneval_problem(row, DREAM + row["prompt"] + "\n")
        for problem, response in (
            (plain, row["canonical_solution"]),
            (begun, row["canonical_solution"] + "```\nIt works so."),
            (plain, f"```python\n{row['prompt']}    return None\n```"),
        ):
            jobs.append(humaneval_job(problem, response))
    for mbpp in MBPP.values():
        jobs += [
            mbpp_job(mbpp_problem(mbpp), mbpp["code"] + "\n[DONE]\nand [DONE]"),
            mbpp_job(mbpp_problem(mbpp, DREAM), mbpp["code"] + "\n```"),
            mbpp_job(mbpp_problem(mbpp), "```\n[BEGIN]\n" + mbpp["code"].replace("return", "return not ")),
        ]
    outcomes = run_all(jobs)
    expected = [True, True, False] * (len(HUMANEVAL) + len(MBPP))
    assert [outcome.passed for outcome in outcomes] == expected, [outcome.note for outcome in outcomes]


def test_a_humaneval_job() -> None:
    row = HUMANEVAL["32"]  # with the helper `poly` in its prompt, which its tests call
    job = humaneval_job(humaneval_problem(row), "    return 1.0\n")
    assert job.trusted == row["prompt"]
    assert job.entry_points == ("find_zero",)
    assert job.tests.endswith("check(find_zero)\n")
    assert "return 1.0" in job.candidate
    assert "def poly" in job.candidate


def test_the_program_of_mbpp_lies_between_its_marks() -> None:
    problem = mbpp_problem(MBPP[11])
    for response in (
        "[BEGIN]\ndef remove_Occ(s,ch):\n    return 1\n[DONE]\ndef remove_Occ(s,ch):\n    return 2",
        "def remove_Occ(s,ch):\n    return 1\n[DONE]",
        "def remove_Occ(s,ch):\n    return 1",
        "[BEGIN]\n[BEGIN]\ndef remove_Occ(s,ch):\n    return 1",
        "[BEGIN]\ndef remove_Occ(s,ch):\n    return 1\n[BEGIN]\ndef remove_Occ(s,ch):\n    return 2",
        "def remove_Occ(s,ch):\n    return 1\n[BEGIN]\ndef remove_Occ(s,ch):\n    return 2",
        "def remove_Occ(s,ch):\n    return 1\n[DONE]\nAnother:\n[BEGIN]\ndef f(x):\n    return 2\n[DONE]",
        "Sure!\n[BEGIN]\n```python\ndef remove_Occ(s,ch):\n    return 1\n```\n[DONE]",
        "```python\n[BEGIN]\ndef remove_Occ(s,ch):\n    return 1\n[DONE]\n```",
        "[DONE]\n[BEGIN]\ndef remove_Occ(s,ch):\n    return 1",
        "\ufeff[BEGIN]\r\ndef remove_Occ(s,ch):\r\n    return 1\r\n[DONE]",
    ):
        job = mbpp_job(problem, response)
        assert job.candidate == "def remove_Occ(s, ch):\n    return 1\n"
        assert job.entry_points == ("remove_Occ",)


def test_names_that_mbpp_tests_take_from_the_program() -> None:
    def names(test: str, reference: str | None, setup: str = "") -> set[str]:
        return mbpp_entry_points(
            Problem("p", "s", "", "", reference, {"test_list": [test], "test_setup_code": setup})
        )

    assert names("assert f([1]) == 2", None) == {"f"}
    assert names("assert set(f(x)) == {math.pi}", None, "x = 1") == {"f"}
    assert names("assert sum(1, 2) == 3", "def sum(a, b): return a + b") == {"sum"}
    assert names("assert sum([1, 2]) == 3", "def f(): pass") == set()
    assert mbpp_entry_points(mbpp_problem(MBPP[367])) == {"Node", "is_tree_balanced"}


def test_problems_without_tests_are_named() -> None:
    for row in HUMANEVAL.values():
        problem = humaneval_problem(row)
        assert humaneval_misfit(problem) is None
        assert "'test' is none" in str(
            humaneval_misfit(Problem("p", "s", "", extra=problem.extra | {"test": "1 +"}))
        )
    assert "'prompt' is none" in str(humaneval_misfit(Problem("p", "s", "")))
    for mbpp in MBPP.values():
        assert mbpp_misfit(mbpp_problem(mbpp)) is None
    assert mbpp_misfit(Problem("p", "s", "", extra={"test_list": ["assert f() == 1"]})) is None
    faulty: list[Any] = [None, [], "assert f()", ["assert f("], [1]]
    for tests in faulty:
        problem = Problem("p", "s", "", extra={"test_list": tests})
        assert "needs protocol.extra" in str(mbpp_misfit(problem))
    assert "use nothing" in str(
        mbpp_misfit(Problem("p", "s", "", extra={"test_list": ["assert len('a') == 1"]}))
    )


def test_the_sandbox_is_bubblewrap_or_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MODE_VARIABLE, raising=False)
    assert sandbox_mode() == "bubblewrap"
    monkeypatch.setenv(MODE_VARIABLE, "unshare")
    assert sandbox_mode() == "unshare"
    monkeypatch.setenv(MODE_VARIABLE, "none")
    with pytest.raises(SandboxError, match="DPARALLEL_SANDBOX=none: known modes are bubblewrap, unshare"):
        sandbox_mode()
