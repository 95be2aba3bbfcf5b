"""What judges responses: scorers, which judge a batch of texts and return named metrics for each."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dparallel.config.base import UserError
from dparallel.problems.pool import nothing
from dparallel.problems.sources import Problem
from dparallel.stages.code import source_digest


@dataclass(frozen=True)
class Verdict:
    """Judgement of a response.

    Attributes:
        metrics: by metric, whether the response is correct, or another value of the kind that the scorer
            states for the metric (`Measure`); None if unknown.
        note: the reason, such as "timed out after 10 s" or "AssertionError: ..."; None if there is nothing to
            say.
    """

    metrics: dict[str, Any]
    note: str | None = None


Response = str | list[str]  # a list for a scorer with `repeats`, where responses are sampled
Judge = Callable[[Sequence[Problem], Sequence[Any]], list[Verdict]]  # problems and their responses


def fits(problem: Problem) -> str | None:
    """Every problem can be judged."""
    return None


class ScorerError(UserError):
    """A scorer breaks its contract; the message names it, what it gives, and what it should give."""


@dataclass(frozen=True)
class Measure:
    """What the verdicts of a metric are, and how they become one number.

    Attributes:
        kind: `flag`: True or False. `share`: a number from 0 to `full`, such as F1. `number`: any finite
            number, on a scale without a best value. `item`: a JSON value of any form, of which `whole` makes
            the number of all responses together, such as BLEU of a corpus; the others are averaged.
        full: the number that counts as 100 %; None for a scale without one.
        whole: the number of a list of items; for the kind `item` alone.
        lower_is_better: such a metric is shown, and never the accuracy.

    Raises:
        ScorerError: they do not fit each other.
    """

    kind: Literal["flag", "share", "number", "item"] = "flag"
    full: float | None = 1.0
    whole: Callable[[list[Any]], float] | None = None
    lower_is_better: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ScorerError(f"kind={self.kind!r} of a metric: give one of {', '.join(KINDS)}")
        if (self.kind == "item") != (self.whole is not None):
            raise ScorerError(
                f"kind={self.kind!r} of a metric with whole={self.whole!r}: the kind 'item' needs whole, the "
                "number of a list of items; others are averaged and have none"
            )
        if self.kind == "number" and self.full is not None:
            raise ScorerError(
                f"kind='number' of a metric with full={self.full!r}: give full=None, or 'share'"
            )
        if self.kind in ("flag", "share") and (self.full is None or not 0 < self.full < math.inf):
            raise ScorerError(
                f"kind={self.kind!r} of a metric with full={self.full!r}: give a positive number"
            )

    def is_right(self, value: Any) -> bool | None:
        """Whether a verdict is the best one; None if unknown, also of what is judged only with others."""
        if value is None or isinstance(value, bool):
            return value
        return None if self.kind in ("number", "item") else bool(value == self.full)

    def misfit(self, value: Any) -> str | None:
        """What a verdict must be, if `value` is none; None is one for every kind."""
        if value is None or (self.kind in ("flag", "share") and type(value) is bool):
            return None
        if self.kind == "flag":
            return "True or False"
        if self.kind == "item":
            return None if _is_json(value) else "a JSON value"
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            return "a number"
        inside = self.full is None or 0 <= value <= self.full
        return None if inside else f"a number from 0 to {self.full:g}"


KINDS = ("flag", "share", "number", "item")
FLAG = Measure()


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


COLUMNS = ("row", "problem_id", "prompt", "reference", "response", "note")  # stored beside verdicts


@dataclass(frozen=True)
class Scorer:
    """A way to judge responses.

    Each response is judged by itself in a worker process with a time limit and a memory limit, so that no
    scorer can hang or end the run.

    Attributes:
        version: part of the key of every stored verdict, together with the code in `stages.code.SCORERS`;
            incremented when a library called by the scorer changes its verdicts.
        metrics: names of the verdicts it gives, the most important first, which is the accuracy.
        measures: what the verdicts of metrics are that are not simply True or False.
        score: verdicts for problems and their responses, in order.
        misfit: why no response to a problem can be judged correct; None if there is no such reason.
        needs_reference: whether problems without a reference cannot be judged.
        in_process: judge all responses at once, in this process and without a limit. Only for functions that
            take linear time for texts of any content, and neither wait nor run anything else.
        repeats: number of responses to every problem that it judges together where responses are sampled, as
            a list in place of each response; of others, which would be equal, it is given one.
        seconds: limit for a response, not counting the time that its process waits for a CPU; a response that
            exceeds it is incorrect.
        prepare: imports libraries and raises a UserError if this machine cannot judge (a library or program
            is missing); called before problems are accepted, and in every worker before its first response.
        environment: what else decides its verdicts on this machine, such as versions of libraries or the kind
            of sandbox; part of the key of every stored verdict.
        sandbox: how it confines generated code; empty for scorers that run none.

    Raises:
        ScorerError: `metrics`, `measures` or `seconds` cannot be used.
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
    measures: Mapping[str, Measure] = field(default_factory=dict)
    repeats: int = 1

    def __post_init__(self) -> None:
        names = self.metrics
        if not isinstance(names, tuple) or not names or not all(isinstance(name, str) for name in names):
            raise ScorerError(f"scorer {self.name!r}: metrics={names!r}: give a tuple of names, at least one")
        if len(set(names)) < len(names) or not set(names).isdisjoint(COLUMNS):
            raise ScorerError(
                f"scorer {self.name!r}: metrics={names!r}: give different names, none of {', '.join(COLUMNS)}"
            )
        if unknown := set(self.measures) - set(names):
            raise ScorerError(
                f"scorer {self.name!r}: measures of {', '.join(sorted(unknown))}; its metrics are "
                f"{', '.join(names)}"
            )
        first = self.measure(names[0])
        if first.full is None or first.lower_is_better:
            raise ScorerError(
                f"scorer {self.name!r}: its first metric, {names[0]!r}, is the accuracy: put one first that "
                "has a best value (full), and of which more is better"
            )
        if not 0 < self.seconds < math.inf:
            raise ScorerError(f"scorer {self.name!r}: seconds={self.seconds!r}: give a positive number")

    def measure(self, metric: str) -> Measure:
        """What the verdicts of a metric are."""
        return self.measures.get(metric, FLAG)

    def failed(self) -> dict[str, Any]:
        """The metrics of a response that could not be judged: wrong, or unknown where that has no value."""
        kinds = {metric: self.measure(metric).kind for metric in self.metrics}
        return {metric: False if kind in ("flag", "share") else None for metric, kind in kinds.items()}

    def identity(self) -> list[Any]:
        """What determines verdicts besides problems, responses and the package's code, as JSON values."""
        limit = None if self.in_process else self.seconds
        own = [digest for digest in [source_digest(self.score)] if digest is not None]
        return [self.name, self.version, limit, self.environment(), *own]

    def checked(self, verdicts: Any, count: int) -> list[Verdict]:
        """What `score` gave for `count` responses.

        Raises:
            ScorerError: it is no list of verdicts with the metrics of this scorer, each of its kind.
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
            if needed := self.measure(metric).misfit(value):
                raise ScorerError(
                    f"scorer {self.name!r} gives {value!r:.80} (of type {type(value).__name__}) for the "
                    f"metric {metric!r}: give {needed}, or None where it cannot tell"
                )
        if not isinstance(verdict.note, str | None):
            raise ScorerError(
                f"scorer {self.name!r} gives the note {verdict.note!r:.80}: give a text or None"
            )
