"""What judges responses: scorers, which judge a batch of texts and return named metrics for each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
        seconds: wall-clock limit for a response, with `processes`; a response that exceeds it twice is
            incorrect.
        prepare: imports libraries and raises a UserError if this machine cannot judge (a library or program
            is missing); called before problems are accepted, and in every worker before its first response.
        environment: what else decides its verdicts on this machine, such as versions of libraries or the kind
            of sandbox; part of the key of every stored verdict.
    """

    name: str
    version: int
    metrics: tuple[str, ...]
    score: Judge
    misfit: Callable[[Problem], str | None] = fits
    needs_reference: bool = True
    processes: bool = False
    seconds: float = 10.0
    prepare: Callable[[], None] = nothing
    environment: Callable[[], str] = str

    def identity(self) -> list[Any]:
        """What determines verdicts besides problems, responses and code, as JSON values."""
        limit = self.seconds if self.processes else None
        return [self.name, self.version, limit, self.environment()]
