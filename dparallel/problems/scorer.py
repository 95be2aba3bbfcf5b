"""What judges responses: scorers, which judge a batch of texts and return named metrics for each."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dparallel.config.base import UserError
from dparallel.problems.pool import nothing
from dparallel.problems.sources import Problem


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


def fits(problem: Problem) -> str | None:
    """Every problem can be judged."""
    return None


class ScorerError(UserError):
    """A scorer breaks its contract; the message names it, what it gives, and what it should give."""


COLUMNS = ("row", "problem_id", "prompt", "reference", "response", "note")  # stored beside verdicts


@dataclass(frozen=True)
class Scorer:
    """A way to judge responses.

    Each response is judged by itself in a worker process with a time limit and a memory limit, so that no
    scorer can hang or end the run.

    Attributes:
        version: part of the key of every stored verdict, together with the code in `stages.code.SCORERS`;
            incremented when a library called by the scorer changes its verdicts.
        metrics: names of the verdicts it gives, the most important first.
        score: verdicts for problems and their responses, in order.
        misfit: why no response to a problem can be judged correct; None if there is no such reason.
        needs_reference: whether problems without a reference cannot be judged.
        in_process: judge all responses at once, in this process and without a limit. Only for functions that
            take linear time for texts of any content, and neither wait nor run anything else.
        seconds: limit for a response, not counting the time that its process waits for a CPU; a response that
            exceeds it is incorrect.
        prepare: imports libraries and raises a UserError if this machine cannot judge (a library or program
            is missing); called before problems are accepted, and in every worker before its first response.
        environment: what else decides its verdicts on this machine, such as versions of libraries or the kind
            of sandbox; part of the key of every stored verdict.
        sandbox: how it confines generated code; empty for scorers that run none.

    Raises:
        ScorerError: `metrics` or `seconds` cannot be used.
    """

    name: str
    version: int
    metrics: tuple[str, ...]
    score: Judge
    misfit: Callable[[Problem], str | None] = fits
    needs_reference: bool = True
    in_process: bool = False
    seconds: float = 10.0
    prepare: Callable[[], None] = nothing
    environment: Callable[[], str] = str
    sandbox: Callable[[], str] = str

    def __post_init__(self) -> None:
        names = self.metrics
        if not isinstance(names, tuple) or not names or not all(isinstance(name, str) for name in names):
            raise ScorerError(f"scorer {self.name!r}: metrics={names!r}: give a tuple of names, at least one")
        if len(set(names)) < len(names) or not set(names).isdisjoint(COLUMNS):
            raise ScorerError(
                f"scorer {self.name!r}: metrics={names!r}: give different names, none of {', '.join(COLUMNS)}"
            )
        if not 0 < self.seconds < math.inf:
            raise ScorerError(f"scorer {self.name!r}: seconds={self.seconds!r}: give a positive number")

    def identity(self) -> list[Any]:
        """What determines verdicts besides problems, responses and code, as JSON values."""
        limit = None if self.in_process else self.seconds
        return [self.name, self.version, limit, self.environment()]

    def checked(self, verdicts: Any, count: int) -> list[Verdict]:
        """What `score` gave for `count` responses.

        Raises:
            ScorerError: it is no list of verdicts with the metrics of this scorer, each True, False or None.
        """
        if not isinstance(verdicts, list | tuple) or len(verdicts) != count:
            given = f"{len(verdicts)} verdicts" if isinstance(verdicts, list | tuple) else repr(verdicts)[:80]
            raise ScorerError(f"scorer {self.name!r} gives {given} for {count} responses: one each is needed")
        for verdict in verdicts:
            self._check(verdict)
        return list(verdicts)

    def _check(self, verdict: Any) -> None:
        if not isinstance(verdict, Verdict) or not isinstance(verdict.metrics, dict):
            raise ScorerError(
                f"scorer {self.name!r} gives {verdict!r:.80}: give a Verdict with a dict of metrics"
            )
        if tuple(verdict.metrics) != self.metrics:
            raise ScorerError(
                f"scorer {self.name!r} gives the metrics {[*verdict.metrics]}, expected {[*self.metrics]}"
            )
        for metric, value in verdict.metrics.items():
            if value is not None and type(value) is not bool:
                raise ScorerError(
                    f"scorer {self.name!r} gives {value!r:.80} (of type {type(value).__name__}) for the "
                    f"metric {metric!r}: give True or False, or None where it cannot tell"
                )
        if not isinstance(verdict.note, str | None):
            raise ScorerError(
                f"scorer {self.name!r} gives the note {verdict.note!r:.80}: give a text or None"
            )
