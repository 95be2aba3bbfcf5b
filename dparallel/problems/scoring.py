"""Is a response right? Scorers judge a batch of texts and give named verdicts; all are pure functions."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dparallel.config.problems import ProtocolConfig
from dparallel.problems import coins
from dparallel.problems.sources import Problem, ProblemsError

NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
NO_NUMBER = "[invalid]"

Verdict = dict[str, bool | None]  # by the names of metrics; None where unknown
Judge = Callable[[Sequence[Problem], Sequence[str]], list[Verdict]]


@dataclass(frozen=True)
class Scorer:
    """Judges responses.

    Attributes:
        version: raised when the same response may get another verdict; part of the key of every verdict.
        metrics: what it says of a response, the most important first.
        score: verdicts for problems and their responses, in their order.
        misfit: why no response to this problem can ever be right; None where one can.
    """

    name: str
    version: int
    metrics: tuple[str, ...]
    score: Judge
    misfit: Callable[[Problem], str | None] = lambda problem: None
    needs_reference: bool = True


def scorers_of(protocol: ProtocolConfig) -> list[Scorer]:
    """The scorers that a protocol names.

    Raises:
        ProblemsError: a scorer that does not exist; two scorers with a metric of the same name.
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
    """The metric that is the accuracy: the first one of the first scorer."""
    return scorers_of(protocol)[0].metrics[0]


def score(problems: Sequence[Problem], responses: Sequence[str], protocol: ProtocolConfig) -> list[Verdict]:
    """What all scorers of a protocol say of each response."""
    verdicts: list[Verdict] = [{} for _ in problems]
    for scorer in scorers_of(protocol):
        for verdict, found in zip(verdicts, scorer.score(problems, responses), strict=True):
            verdict |= found
    return verdicts


def check_scorable(
    problems: Sequence[Problem], protocol: ProtocolConfig, need_references: bool = True
) -> None:
    """Refuse problems that no response could be judged against.

    Args:
        need_references: also refuse a problem without a reference where a scorer needs one; otherwise
            its verdict is unknown.

    Raises:
        ProblemsError: naming the first such problem and the remedy.
    """
    for scorer in scorers_of(protocol):
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


# exact


def exact(reference: str, response: str) -> bool:
    """The same text, but for blanks around it."""
    return response.strip() == reference.strip()


# flexible_extract


def flexible_extract(reference: str, response: str) -> bool:
    """The last number of the response is the reference's final answer: lm-eval's score of GSM8K.

    That is the filter `flexible-extract` and then `exact_match` of lm-eval's `gsm8k`. As there, numbers
    are compared as texts (18.0 is not 18), and the dots of an ellipsis count as the last number.
    """
    found = NUMBER.findall(response)
    number = next(filter(None, found[-1])) if found else NO_NUMBER
    return plain_number(number) == plain_number(reference)


def plain_number(text: str) -> str:
    """What is compared: without `,`, then without `$`, then what follows the last `#### `, then without
    a final dot; in small letters.
    """
    text = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return re.sub(r"\.$", "", text).lower()


def _no_number(problem: Problem) -> str | None:
    answer = plain_number(problem.reference or "")
    if NUMBER.fullmatch(answer):
        return None
    return f"compares numbers, but the reference ends in {answer[-40:]!r}: end it in one, as '#### 18'"


# coins


def _judge_coins(problem: Problem, response: str) -> Verdict:
    stated = coins.parse_prompt(problem.prompt)
    return {
        "solution": coins.solution_is_valid(stated, response),
        "answer": coins.answer_is_right(stated, response),
    }


def _no_coins(problem: Problem) -> str | None:
    try:
        coins.parse_prompt(problem.prompt)
    except coins.NoCoinsProblem as error:
        return f"judges coins problems alone: {error}"
    return None


def _against_reference(metric: str, right: Callable[[str, str], bool]) -> Judge:
    """A judge of one metric that compares a response with the reference."""

    def judge(problems: Sequence[Problem], responses: Sequence[str]) -> list[Verdict]:
        return [
            {metric: None if problem.reference is None else right(problem.reference, response)}
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
        Scorer("exact", 1, ("exact",), _against_reference("exact", exact)),
        Scorer(
            "flexible_extract",
            2,
            ("flexible_extract",),
            _against_reference("flexible_extract", flexible_extract),
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
