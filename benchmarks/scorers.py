"""Check the scorers on whole benchmarks: reference solutions must be right, corrupted ones wrong.

    python -m benchmarks.scorers --data FOLDER

FOLDER holds the published files gsm8k_test.jsonl, math500_test.jsonl, HumanEval.jsonl.gz and mbpp.jsonl. It
prints a table with a row for each scorer and each way to corrupt a response, then every verdict that is not
as expected, with the reason. The exit code is 0 if all verdicts are as expected; of MATH's references, 5 may
be judged wrong.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common.hardware import describe
from benchmarks.common.tables import table
from dparallel.config.base import UserError
from dparallel.config.problems import ProblemsConfig, ProtocolConfig, SourceConfig
from dparallel.problems.answers import plain_number
from dparallel.problems.code_tests import mbpp_entry_points
from dparallel.problems.judging import judged
from dparallel.problems.mathematics import answer_of, normalized
from dparallel.problems.registry import load_problems
from dparallel.problems.scoring import SCORERS, check_scorable
from dparallel.problems.sources import Problem
from dparallel.stages.streams import set_encodings

Responses = Callable[[Sequence[Problem]], list[str]]


@dataclass(frozen=True)
class Benchmark:
    """A published benchmark; `file` is its file in the folder, `rows` a slice of it."""

    title: str
    file: str
    protocol: ProtocolConfig
    reference: str
    id: str | None = None
    rows: str = ""
    allowed: int = 0  # wrong references

    def problems(self, folder: Path) -> list[Problem]:
        """Its problems, checked for what the scorers need."""
        source = SourceConfig(
            path=str(folder / self.file), split=f"train{self.rows}", reference=self.reference, id=self.id
        )
        config = ProblemsConfig(benchmark="dataset", sources=(source,), protocol=self.protocol)
        problems = load_problems(config)
        check_scorable(problems, self.protocol)
        return problems


@dataclass(frozen=True)
class Check:
    """Responses to all problems of a benchmark that a scorer must judge right, and others to judge wrong.

    Attributes:
        canonical, corrupted: the responses.
        how: how the corrupted ones are made.
    """

    benchmark: str
    scorer: str
    canonical: Responses
    corrupted: Responses
    how: str


@dataclass(frozen=True)
class Result:
    """Verdicts of a check; `surprises` says what is not as expected."""

    check: Check
    title: str
    problems: int
    canonical: int
    corrupted: int
    seconds: float
    surprises: list[str]


BENCHMARKS = {
    "gsm8k": Benchmark(
        "GSM8K",
        "gsm8k_test.jsonl",
        ProtocolConfig(
            prompt="{question}", scorers=("flexible_extract", "strict_match", "strict_match_cot", "boxed")
        ),
        reference="answer",
    ),
    "math500": Benchmark(
        "MATH-500",
        "math500_test.jsonl",
        ProtocolConfig(prompt="{problem}", scorers=("math_verify", "minerva")),
        reference="solution",
        id="unique_id",
        allowed=5,
    ),
    "humaneval": Benchmark(
        "HumanEval",
        "HumanEval.jsonl.gz",
        ProtocolConfig(prompt="{prompt}", scorers=("humaneval",), extra=("prompt", "entry_point", "test")),
        reference="canonical_solution",
        id="task_id",
    ),
    "mbpp": Benchmark(
        "MBPP",
        "mbpp.jsonl",
        ProtocolConfig(prompt="{text}", scorers=("mbpp",), extra=("test_list", "test_setup_code")),
        reference="code",
        id="task_id",
        rows="[10:510]",  # the tasks 11 to 510, its test split
    ),
}


def references(problems: Sequence[Problem]) -> list[str]:
    return [problem.reference or "" for problem in problems]


def numbers(form: str, added: int = 0) -> Responses:
    """Solutions of GSM8K that end in their number, plus `added`, in this form."""

    def responses(problems: Sequence[Problem]) -> list[str]:
        return [_with_number(problem.reference or "", form, added) for problem in problems]

    return responses


def _with_number(solution: str, form: str, added: int) -> str:
    number = plain_number(solution)
    return solution.rpartition("#### ")[0] + form.format(int(number) + added if added else number)


def answers(form: str, other: bool = False) -> Responses:
    """Final answers of MATH in this form; with `other`, that of the next problem with another answer."""

    def responses(problems: Sequence[Problem]) -> list[str]:
        stated = [answer_of(problem.reference or "") for problem in problems]
        return [form.format(_next(stated, place) if other else answer) for place, answer in enumerate(stated)]

    return responses


def _next(stated: Sequence[str], place: int) -> str:
    """The next problem's answer that does not begin as this one's: to Minerva's rules, `3, 5` equals 3."""
    following = [*stated[place + 1 :], *stated[:place]]
    right = normalized(stated[place])
    return next(
        answer
        for answer in following
        if right.partition(",")[0] not in (normalized(answer), normalized(answer).partition(",")[0])
    )


def program(body: str) -> Responses:
    """Programs that define all that the tests use as a function with this body."""

    def responses(problems: Sequence[Problem]) -> list[str]:
        return ["".join(f"def {name}(*_):\n    {body}\n" for name in _names(problem)) for problem in problems]

    return responses


def _names(problem: Problem) -> list[str]:
    if "entry_point" in problem.extra:
        return [problem.extra["entry_point"]]
    return sorted(mbpp_entry_points(problem))


FINAL = "Final Answer: The final answer is ${}$. I hope it is correct."
NOTHING = program("return None")
EQUAL = program("return type('', (), {'__eq__': lambda *_: True, '__ne__': lambda *_: False})()")
CHECKS = (
    Check("gsm8k", "flexible_extract", references, numbers("#### {}", 1), "the number + 1"),
    Check("gsm8k", "strict_match", references, numbers("#### {}", 1), "the number + 1"),
    Check(
        "gsm8k",
        "strict_match_cot",
        numbers("The answer is {}."),
        numbers("The answer is {}.", 1),
        "the number + 1",
    ),
    Check("gsm8k", "boxed", numbers(r"\boxed{{{}}}"), numbers(r"\boxed{{{}}}", 1), "the number + 1"),
    Check("math500", "math_verify", references, answers(r"It is $\boxed{{{}}}$.", True), "another box"),
    Check("math500", "minerva", answers(FINAL), answers(FINAL, True), "another answer"),
    Check("humaneval", "humaneval", references, NOTHING, "returns None"),
    Check("humaneval", "humaneval", references, EQUAL, "returns an object equal to all"),
    Check("mbpp", "mbpp", references, NOTHING, "returns None"),
    Check("mbpp", "mbpp", references, EQUAL, "returns an object equal to all"),
)


def run(check: Check, problems: Sequence[Problem]) -> Result:
    """Judge the responses of a check."""
    scorer, began = SCORERS[check.scorer], time.perf_counter()
    right, surprises = [0, 0], []
    for expected, make in ((True, check.canonical), (False, check.corrupted)):
        responses = make(problems)
        for index, verdict in sorted(judged(scorer, problems, responses), key=lambda found: found[0]):
            correct = verdict.metrics[scorer.metrics[0]]
            right[not expected] += bool(correct)
            if correct is not expected:
                kind = "reference" if expected else check.how
                surprises.append(
                    f"{check.scorer}, {problems[index].problem_id}: {kind} judged {correct} "
                    f"({verdict.note or 'no note'}): {responses[index][-200:]!r}"
                )
    seconds = time.perf_counter() - began
    title = BENCHMARKS[check.benchmark].title
    return Result(check, title, len(problems), right[0], right[1], seconds, surprises)


def report(results: Sequence[Result]) -> str:
    """The table, and what is not as expected."""
    text = table(
        results,
        {
            "benchmark": lambda result: result.title,
            "scorer": lambda result: result.check.scorer,
            "references right": lambda result: f"{result.canonical:,} / {result.problems:,}",
            "corrupted right": lambda result: f"{result.corrupted:,} / {result.problems:,}",
            "corrupted how": lambda result: result.check.how,
            "seconds": lambda result: f"{result.seconds:.1f}",
        },
        texts=("benchmark", "scorer", "corrupted how"),
    )
    return "\n".join([text, "", *(line for result in results for line in result.surprises)])


def as_allowed(result: Result) -> bool:
    """Whether the verdicts are good enough."""
    allowed = BENCHMARKS[result.check.benchmark].allowed
    return result.problems - result.canonical <= allowed and not result.corrupted


def main(arguments: Sequence[str] | None = None) -> int:
    set_encodings()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--benchmarks", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    options = parser.parse_args(arguments)
    try:
        problems = {name: BENCHMARKS[name].problems(options.data) for name in options.benchmarks}
        results = [run(check, problems[check.benchmark]) for check in CHECKS if check.benchmark in problems]
    except UserError as error:
        parser.error(str(error))
    print(report(results))
    print(", ".join(f"{name}: {value}" for name, value in describe(torch.device("cpu")).items()))
    return 0 if all(map(as_allowed, results)) else 1


if __name__ == "__main__":
    sys.exit(main())
