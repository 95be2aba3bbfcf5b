"""What judges responses: scorers, which judge a batch of texts and return named metrics for each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dparallel.config.problems import ProtocolConfig
from dparallel.problems import answers, coins
from dparallel.problems.pool import nothing
from dparallel.problems.sources import Problem, ProblemsError


@dataclass(frozen=True)
class Verdict:
    """Judgement of a response.

    Attributes:
        metrics: whether the response is correct, by metric; None if unknown.
        note: the reason, such as "timed out after 10 s" or "AssertionError: ..."; None if there is nothing to
            say.
    """

    metrics: dict[str, bool | None]
    note: str | None = None


Judge = Callable[[Sequence[Problem], Sequence[str]], list[Verdict]]


@dataclass(frozen=True)
class Scorer:
    """A way to judge responses.

    A scorer that takes long, may hang, or runs other programs has `processes=True`: each response is judged
    by itself in a worker process. The others must be fast for texts of any content.

    Attributes:
        version: part of the key of every stored verdict, together with the code in `stages.code.SCORERS`;
            incremented when a library called by the scorer changes its verdicts.
        metrics: names of the verdicts it gives, the most important first.
        score: verdicts for problems and their responses, in order.
        misfit: why no response to a problem can be judged correct; None if there is no such reason.
        needs_reference: whether problems without a reference cannot be judged.
        processes: judge in worker processes, which import `score` and `prepare` by name.
        seconds: wall-clock limit for a response, with `processes`; a response that exceeds it is incorrect.
        prepare: imports libraries and raises a UserError if this machine cannot judge (a library or program
            is missing); called before problems are accepted, and in every worker before its first response.
    """

    name: str
    version: int
    metrics: tuple[str, ...]
    score: Judge
    misfit: Callable[[Problem], str | None] = lambda problem: None
    needs_reference: bool = True
    processes: bool = False
    seconds: float = 10.0
    prepare: Callable[[], None] = nothing


def scorers_of(protocol: ProtocolConfig) -> list[Scorer]:
    """The scorers named by a protocol.

    Raises:
        ProblemsError: a scorer is unknown, or two scorers have a metric of the same name.
    """
    if unknown := [name for name in protocol.scorers if name not in SCORERS]:
        raise ProblemsError(f"protocol.scorers: unknown scorer {unknown[0]!r}; known: {', '.join(SCORERS)}")
    scorers = [SCORERS[name] for name in protocol.scorers]
    metrics = [metric for scorer in scorers for metric in scorer.metrics]
    if twice := [metric for metric in metrics if metrics.count(metric) > 1]:
        raise ProblemsError(
            f"protocol.scorers={list(protocol.scorers)}: more than one of them gives {twice[0]!r}; drop one"
        )
    return scorers


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
            where = f"problem {problem.problem_id} ({problem.source})"
            if scorer.needs_reference and problem.reference is None:
                if need_references:
                    raise ProblemsError(
                        f"{where} has no reference, so {scorer.name} cannot judge its response; leave the "
                        "problem out or add a reference"
                    )
            elif reason := scorer.misfit(problem):
                raise ProblemsError(f"{where}: scorer {scorer.name} {reason}")


# Scorers


def _no_number(problem: Problem) -> str | None:
    answer = answers.plain_number(problem.reference or "")
    if answers.NUMBER.fullmatch(answer):
        return None
    return f"compares numbers, but the reference ends in {answer[-40:]!r}: end it in one, as '#### 18'"


def _judge_coins(problem: Problem, response: str) -> Verdict:
    stated = coins.parse_prompt(problem.prompt)
    return Verdict(
        {
            "solution": coins.solution_is_valid(stated, response),
            "answer": coins.answer_is_right(stated, response),
        }
    )


def _no_coins(problem: Problem) -> str | None:
    try:
        coins.parse_prompt(problem.prompt)
    except coins.NoCoinsProblem as error:
        return f"judges coins problems alone: {error}"
    return None


def _against_reference(metric: str, right: Callable[[str, str], bool]) -> Judge:
    """A judge with one metric that compares responses with the reference."""

    def judge(problems: Sequence[Problem], responses: Sequence[str]) -> list[Verdict]:
        return [
            Verdict({metric: None if problem.reference is None else right(problem.reference, response)})
            for problem, response in zip(problems, responses, strict=True)
        ]

    return judge


def _one_by_one(judge_one: Callable[[Problem, str], Verdict]) -> Judge:
    def judge(problems: Sequence[Problem], responses: Sequence[str]) -> list[Verdict]:
        return [judge_one(*pair) for pair in zip(problems, responses, strict=True)]

    return judge


SCORERS = {
    scorer.name: scorer
    for scorer in (
        Scorer("exact", 1, ("exact",), _against_reference("exact", answers.exact)),
        Scorer(
            "flexible_extract",
            2,
            ("flexible_extract",),
            _against_reference("flexible_extract", answers.flexible_extract),
            misfit=_no_number,
        ),
        Scorer(
            "coins",
            1,
            ("solution", "answer"),
            _one_by_one(_judge_coins),
            misfit=_no_coins,
            needs_reference=False,
        ),
    )
}
