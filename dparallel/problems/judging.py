"""Judge many responses, in this process or in worker processes. No scorer can hang or end the run."""

import contextlib
import logging
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

from dparallel.config.base import UserError
from dparallel.config.problems import ProtocolConfig
from dparallel.problems.pool import Outcome, call_each
from dparallel.problems.scorer import Response, Scorer, Verdict
from dparallel.problems.scoring import scorers_of
from dparallel.problems.sources import Problem
from dparallel.problems.worker import NOTE_LENGTH, describe
from dparallel.stages.progress import Progress

log = logging.getLogger(__name__)


class JudgingError(UserError):
    """Responses could not be judged; the message names the scorer, the reason and the remedy."""


def score(problems: Sequence[Problem], responses: Sequence[str], protocol: ProtocolConfig) -> list[Verdict]:
    """Verdicts of all scorers of a protocol for each response, with the metrics and notes of all scorers."""
    metrics: list[dict[str, Any]] = [{} for _ in problems]
    notes: list[list[str]] = [[] for _ in problems]
    for scorer in scorers_of(protocol):
        for index, verdict in judged(scorer, problems, responses):
            metrics[index] |= verdict.metrics
            notes[index] += [verdict.note] if verdict.note else []
    return [Verdict(found, "; ".join(why) or None) for found, why in zip(metrics, notes, strict=True)]


def judged(
    scorer: Scorer, problems: Sequence[Problem], responses: Sequence[Response]
) -> Generator[tuple[int, Verdict], None, None]:
    """Judge each response to its problem; yields its index and its verdict when it is known.

    A response is incorrect (or left out, by a metric that has no value for that), with a note, if the scorer
    raises an exception on it, exceeds `scorer.seconds`,
    or twice ends its process. Close the iterator (`contextlib.closing`) to end early.

    Raises:
        UserError: the scorer cannot be used on this machine, or gives something else than verdicts.
        JudgingError: this machine was too busy to judge some responses. Raised after all other verdicts.
    """
    if scorer.in_process:
        yield from enumerate(_judge_here(scorer, problems, responses))
        return
    items = list(zip(problems, responses, strict=True))
    outcomes = call_each(partial(judge_one, scorer), items, scorer.seconds, scorer.prepare)
    progress, failed, lost = Progress(log, len(items)), 0, list[str]()
    with contextlib.closing(outcomes):
        for count, (index, outcome) in enumerate(outcomes, 1):
            if outcome.lost:
                lost.append(f"problem {problems[index].problem_id}: {outcome.failure}")
                continue
            failed += outcome.failure is not None
            yield index, _verdict(scorer, outcome)
            progress.tell(count, f"{scorer.name}: judged {count:,} of {len(items):,} responses")
    if failed:
        log.warning("%s failed on %d of %d responses, which count as wrong", scorer.name, failed, len(items))
    if lost:
        raise JudgingError(
            f"{scorer.name} has no verdict on {len(lost)} of {len(items)} responses ({lost[0]}): run this "
            "again when the CPUs are less busy; complete slices of verdicts are kept"
        )


def judge_one(scorer: Scorer, problem: Problem, response: Response) -> dict[str, Any]:
    """The verdict on one response as JSON values."""
    [verdict] = scorer.checked(scorer.score([problem], [response]), 1)
    return {"metrics": verdict.metrics, "note": _cut(verdict.note)}


def _judge_here(scorer: Scorer, problems: Sequence[Problem], responses: Sequence[Response]) -> list[Verdict]:
    """Judge the whole batch, or one by one if the scorer raises an exception on one of them."""
    try:
        verdicts = scorer.checked(scorer.score(problems, responses), len(problems))
    except UserError:
        raise
    except Exception:
        log.warning("%s failed on one of %d responses", scorer.name, len(problems), exc_info=True)
        return [
            _verdict(scorer, _outcome(judge_one, scorer, *pair))
            for pair in zip(problems, responses, strict=True)
        ]
    return [Verdict(verdict.metrics, _cut(verdict.note)) for verdict in verdicts]


def _outcome(function: Callable[..., Any], *arguments: Any) -> Outcome:
    try:
        return Outcome(function(*arguments))
    except UserError:
        raise
    except Exception as error:
        return Outcome(failure=describe(error))


def _verdict(scorer: Scorer, outcome: Outcome) -> Verdict:
    if outcome.failure is not None:
        return Verdict(scorer.failed(), outcome.failure)
    return Verdict(**outcome.value)


def _cut(note: str | None) -> str | None:
    return None if note is None else note[:NOTE_LENGTH]
