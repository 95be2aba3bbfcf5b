"""All scorers by name, and whether the responses to problems can be judged by them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from dparallel.config.base import nearest
from dparallel.config.problems import EMBEDDED, LM_EVAL, ProtocolConfig
from dparallel.problems import answers, code_tests, gsm8k, mathematics
from dparallel.problems.embedded import EmbeddedTask, ForeignPrompt, answer_is_right, embedded_task
from dparallel.problems.pool import MachineBusy
from dparallel.problems.sandbox.jobs import Job
from dparallel.problems.sandbox.run import run_tests
from dparallel.problems.scorer import Scorer, Verdict, fits
from dparallel.problems.sources import Problem, ProblemsError

CODE_SECONDS = 300.0  # more than the sandbox takes to start and its own limit of a minute, both twice


def scorers_of(protocol: ProtocolConfig) -> list[Scorer]:
    """The scorers named by a protocol.

    Raises:
        ProblemsError: a scorer is unknown, or two scorers have a metric of the same name.
    """
    scorers = list(map(scorer_named, protocol.scorers))
    metrics = [metric for scorer in scorers for metric in scorer.metrics]
    if twice := [metric for metric in metrics if metrics.count(metric) > 1]:
        raise ProblemsError(
            f"protocol.scorers={list(protocol.scorers)}: more than one of them gives {twice[0]!r}; drop one"
        )
    return scorers


def scorer_named(name: str) -> Scorer:
    """A scorer of `SCORERS`, or the scorer of a task of lm-eval."""
    if name.startswith(f"{LM_EVAL}:"):
        from dparallel.problems.lm_eval_metrics import scorer  # imported here because lm-eval is optional

        return scorer(name)
    if name not in SCORERS:
        hint = nearest(name, list(SCORERS))
        raise ProblemsError(f"protocol.scorers: unknown scorer {name!r}; {hint}known: {', '.join(SCORERS)}")
    return SCORERS[name]


def accuracy_metric(protocol: ProtocolConfig) -> str:
    """The metric used as accuracy: the first metric of the first scorer."""
    return scorers_of(protocol)[0].metrics[0]


def check_scorable(
    problems: Sequence[Problem], protocol: ProtocolConfig, need_references: bool = True
) -> None:
    """Check that responses to these problems can be judged.

    Args:
        need_references: whether a missing reference is an error if a scorer needs it; otherwise the verdict
            is unknown.

    Raises:
        ProblemsError: names the first problem that cannot be judged, and the remedy.
        UserError: this machine lacks something that a scorer needs.
    """
    for scorer in scorers_of(protocol):
        scorer.prepare()
        for problem in problems:
            if scorer.needs_reference and problem.reference is None:
                if need_references:
                    raise ProblemsError(
                        f"{problem.where} has no reference, so {scorer.name} cannot judge its response; "
                        "leave the problem out or add a reference"
                    )
            elif reason := scorer.misfit(problem):
                raise ProblemsError(f"{problem.where}: scorer {scorer.name} {reason}")


# Scorers


def _no_number(problem: Problem) -> str | None:
    answer = answers.plain_number(problem.reference or "")
    if answers.NUMBER.fullmatch(answer):
        return None
    return f"compares numbers, but the reference ends in {answer[-40:]!r}: end it in one, as '#### 18'"


def _judge_solution(task: EmbeddedTask[Any], problem: Problem, response: str) -> Verdict:
    stated, response = task.parse_prompt(problem.prompt), problem.prefill + response
    mistake = task.mistake(stated, response)
    return Verdict({"solution": mistake is None, "answer": answer_is_right(stated, response)}, mistake)


def _foreign(task: EmbeddedTask[Any], problem: Problem) -> str | None:
    try:
        task.parse_prompt(problem.prompt)
    except ForeignPrompt as error:
        return f"judges {task.name} problems alone: {error}"
    return None


def _no_box_number(problem: Problem) -> str | None:
    answer = answers.plain_number(problem.reference or "")
    if gsm8k.number(answer) is not None:
        return None
    return f"compares numbers, but the reference ends in {answer[-40:]!r}: end it in one, as '#### 18'"


def _no_answer(problem: Problem) -> str | None:
    return mathematics.no_answer(problem.reference or "")


def _against_reference(
    metric: str, right: Callable[[str, str], bool], problems: Sequence[Problem], responses: Sequence[str]
) -> list[Verdict]:
    """Verdicts with one metric: whether `right(reference, response)`, with the prefill put back."""
    return [
        Verdict(
            {
                metric: None
                if problem.reference is None
                else right(problem.reference, problem.prefill + response)
            }
        )
        for problem, response in zip(problems, responses, strict=True)
    ]


def _compared(
    name: str,
    right: Callable[[str, str], bool],
    misfit: Callable[[Problem], str | None] = fits,
    version: int = 1,
    **more: Any,
) -> Scorer:
    """A scorer that compares responses with the reference; its metric has its name."""
    return Scorer(name, version, (name,), partial(_against_reference, name, right), misfit, **more)


def _judge_solutions(
    task: EmbeddedTask[Any], problems: Sequence[Problem], responses: Sequence[str]
) -> list[Verdict]:
    return [_judge_solution(task, *pair) for pair in zip(problems, responses, strict=True)]


def _embedded(task: EmbeddedTask[Any]) -> Scorer:
    """The scorer of an embedded task: the whole worked solution, and its answer alone."""
    return Scorer(
        task.name,
        1,
        ("solution", "answer"),
        partial(_judge_solutions, task),
        misfit=partial(_foreign, task),
        needs_reference=False,
        in_process=True,
    )


def _run_tests(
    job_of: Callable[[Problem, str], Job], problems: Sequence[Problem], responses: Sequence[str]
) -> list[Verdict]:
    """Verdicts with the metric `pass_at_1`: whether the program of a response passes its tests."""
    mode = code_tests.sandbox_mode()
    verdicts = []
    for problem, response in zip(problems, responses, strict=True):
        outcome = run_tests(job_of(problem, response), mode)
        if outcome.passed is None:
            raise MachineBusy(outcome.note)
        note = None if outcome.note == "passed" else outcome.note
        verdicts.append(Verdict({"pass_at_1": outcome.passed}, note))
    return verdicts


def _tested(
    name: str, job_of: Callable[[Problem, str], Job], misfit: Callable[[Problem], str | None]
) -> Scorer:
    """A scorer that runs generated code."""
    return Scorer(
        name,
        2,
        ("pass_at_1",),
        partial(_run_tests, job_of),
        misfit,
        needs_reference=False,
        seconds=CODE_SECONDS,
        prepare=code_tests.prepare_sandbox,
        environment=code_tests.environment,
        sandbox=code_tests.sandbox_mode,
    )


SCORERS = {
    scorer.name: scorer
    for scorer in (
        _compared("exact", answers.exact, in_process=True),
        _compared("flexible_extract", answers.flexible_extract, _no_number, version=2, in_process=True),
        _compared("strict_match", gsm8k.strict_match, _no_number, in_process=True),
        _compared("strict_match_cot", gsm8k.strict_match_cot, _no_number, in_process=True),
        _compared("boxed", gsm8k.boxed, _no_box_number, version=2, in_process=True),
        _compared(
            "math_verify",
            mathematics.math_verify,
            _no_answer,
            prepare=mathematics.prepare_math_verify,
            environment=mathematics.environment,
        ),
        _compared(
            "minerva",
            mathematics.minerva,
            _no_answer,
            prepare=mathematics.prepare_minerva,
            environment=mathematics.environment,
        ),
        _tested("humaneval", code_tests.humaneval_job, code_tests.humaneval_misfit),
        _tested("mbpp", code_tests.mbpp_job, code_tests.mbpp_misfit),
        *map(_embedded, map(embedded_task, EMBEDDED)),
    )
}
