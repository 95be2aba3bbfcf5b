"""Samples for readers: the worst regressions, and problems of every outcome with all their responses."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from transformers import PreTrainedTokenizerBase

from dparallel.evaluation.plots import plain
from dparallel.models.checkpoints import load_tokenizer, read_config
from dparallel.pages.replay.drawing import Replays
from dparallel.reporting.read import Answers
from dparallel.reporting.summary import Measured

RESPONSES = 8  # of a sample
CHARACTERS = 3_000  # of a text
OUTCOMES = {
    (True, False): "lost",
    (False, True): "gained",
    (False, False): "solved by neither",
    (True, True): "solved by both",
}
EQUAL, UNKNOWN, POOLED = "equal value", "not judged", "judged together"


@dataclass(frozen=True)
class Response:
    """A response to a problem.

    Attributes:
        label: model, method and threshold.
        value: whether it is correct, or a share of the best value; None if unknown.
        note: reason of the verdict.
        replay: index of its replay in the page; None if there is none.
    """

    label: str
    value: bool | float | None
    text: str
    note: str | None
    replay: int | None = None
    pooled: bool = False

    @property
    def verdict(self) -> str:
        """The value in words, or in percent where it lies between wrong and right."""
        if self.value is None:
            return POOLED if self.pooled else UNKNOWN
        return {0.0: "wrong", 1.0: "right"}.get(float(self.value)) or f"{self.value * 100:.1f} %"

    @property
    def colour(self) -> str:
        """Class of the verdict in the page."""
        return self.verdict if self.verdict in ("wrong", "right") else "unknown"


@dataclass(frozen=True)
class Sample:
    """A problem with responses."""

    problem_id: str
    outcome: str
    prompt: str
    reference: str | None
    responses: list[Response]


@dataclass(frozen=True)
class Exhibition:
    """What a page shows of the comparison of two rows.

    Attributes:
        before, after: labels of the rows.
        counts: number of problems by outcome.
        shown: number of `samples` by outcome.
        regressions: problems that only `before` solves, or on which its value is higher: the largest losses
            first, then those of which `after` is surest.
        samples: problems of every outcome, in order; empty if they are not asked for.
        rule: what counts as lost, where verdicts are not simply right or wrong.
    """

    before: str
    after: str
    counts: dict[str, int]
    shown: dict[str, int]
    regressions: list[Sample]
    samples: list[Sample]
    rule: str = ""

    @property
    def problems(self) -> int:
        return sum(self.counts.values())

    @property
    def filters(self) -> list[tuple[str, int, int]]:
        """Outcome, number of samples shown, and number of problems."""
        return [(outcome, self.shown[outcome], count) for outcome, count in self.counts.items()]


class Exhibitor:
    """Chooses what a page shows, and collects the replays.

    Args:
        per_outcome: samples of each outcome, and regressions, of a comparison.
    """

    def __init__(self, per_outcome: int):
        self.replays = Replays(readings=False)
        self._per_outcome = per_outcome
        self._tokenizer = cache(_tokenizer)

    def show(self, before: Measured, after: Measured, with_samples: bool) -> Exhibition:
        """Choose regressions and samples of two rows."""
        first, second = (benchmark.answers(row) for benchmark, row in (before, after))
        common = [(place, second.places[key]) for key, place in first.places.items() if key in second.places]
        values = {pair: (first.verdicts[pair[0]], second.verdicts[pair[1]]) for pair in common}
        outcomes = {pair: POOLED if first.pooled else _outcome(*values[pair]) for pair in common}
        names = [*OUTCOMES.values(), EQUAL, UNKNOWN, POOLED]
        counts = {name: list(outcomes.values()).count(name) for name in names}
        lost = [pair for pair in common if outcomes[pair] == "lost"]
        worst = self._surest_first(before, after, lost)[: self._per_outcome]
        chosen = [
            pair
            for name in counts
            for pair in [pair for pair in common if outcomes[pair] == name][: self._per_outcome]
            if with_samples
        ]
        return Exhibition(
            before=_label(before),
            after=_label(after),
            counts={name: count for name, count in counts.items() if count},
            shown={name: min(count, self._per_outcome) for name, count in counts.items() if count},
            regressions=[self._regression(before, after, *pair) for pair in worst],
            samples=[_sample(_beside(before, after), pair, outcomes[pair], first) for pair in sorted(chosen)],
            rule=_rule(first, second, list(values.values())),
        )

    def _surest_first(
        self, before: Measured, after: Measured, pairs: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """Problems by the loss, then by the mean confidence of the response's tokens when committed."""
        (earlier, of), (benchmark, row) = before, after
        first, second = earlier.answers(of).verdicts, benchmark.answers(row).verdicts

        def change(pair: tuple[int, int]) -> float:
            return float(second[pair[1]] or 0) - float(first[pair[0]] or 0)

        def confidence(pair: tuple[int, int]) -> float:
            [sample] = benchmark.samples(row).slice(pair[1], 1).to_pylist()
            sure = [value for value in sample["confidence"][: sample["num_tokens"]] if value > 0]
            return sum(sure) / max(len(sure), 1)

        return sorted(pairs, key=lambda pair: (change(pair), -confidence(pair), pair))

    def _regression(self, before: Measured, after: Measured, place: int, other: int) -> Sample:
        first, second = (benchmark.answers(row) for benchmark, row in (before, after))
        responses = [
            replace(_response(of, answers, at), replay=self._replay(of, at))
            for of, answers, at in ((before, first, place), (after, second, other))
        ]
        return _problem(first, place, "lost", responses)

    def _replay(self, of: Measured, place: int) -> int | None:
        benchmark, row = of
        folder = benchmark.models.get(row.model)
        if folder is None:
            return None
        tokenizer, end_token_ids = self._tokenizer(folder)
        answers = benchmark.answers(row)
        [sample] = benchmark.samples(row).slice(place, 1).to_pylist()
        name = f"{benchmark.name}, {answers.problem_ids[place]}"
        return self.replays.add(
            subject=f"{name}: {_label(of)}, {_response(of, answers, place).verdict}",
            label=f"{name}: {_label(of)}",
            prompt=capped(answers.prompts[place]),
            decoding=row.measurement.decoding,
            tokenizer=tokenizer,
            end_token_ids=end_token_ids,
            tokens=sample["response_ids"],
            commit_step=sample["commit_step"],
            confidence=sample["confidence"],
            nfe=sample["nfe"],
            num_tokens=sample["num_tokens"],
        )


def capped(text: str) -> str:
    """The beginning of a long text, with the number of characters left out."""
    if len(text) <= CHARACTERS:
        return text
    return f"{text[:CHARACTERS]} […] ({len(text) - CHARACTERS:,} more characters)"


def _tokenizer(folder: str) -> tuple[PreTrainedTokenizerBase, Sequence[int]]:
    return load_tokenizer(folder), read_config(folder).end_token_ids


def _outcome(before: bool | float | None, after: bool | float | None) -> str:
    if before is None or after is None:
        return UNKNOWN
    if before in (0, 1) and after in (0, 1):
        return OUTCOMES[bool(before), bool(after)]
    if before == after:
        return EQUAL
    return OUTCOMES[before > after, after > before]


def _rule(
    answers: Answers, later: Answers, values: Sequence[tuple[bool | float | None, bool | float | None]]
) -> str:
    if answers.metric != later.metric:
        return (
            f"The first row is judged by {answers.metric} and the other one by {later.metric}, so that a "
            "problem may be lost or gained by the metric alone."
        )
    if answers.pooled:
        return f"{answers.metric} is a number of all responses together: no problem is lost by itself."
    if any(value not in (None, 0, 1) for pair in values for value in pair):
        return (
            f"A problem is lost if the value of {answers.metric} is lower, and gained if it is higher; the "
            "largest losses come first."
        )
    return ""


def _beside(before: Measured, after: Measured) -> list[Measured]:
    """The rows whose responses stand beside each other: both, then other rows of the second run."""
    benchmark, _ = after
    others = [(benchmark, row) for row in benchmark.reported if row not in (before[1], after[1])]
    return [before, after, *others][:RESPONSES]


def _sample(rows: Sequence[Measured], pair: tuple[int, int], outcome: str, first: Answers) -> Sample:
    responses = []
    for number, (benchmark, row) in enumerate(rows):
        answers, place = benchmark.answers(row), pair[0 if number == 0 else 1]
        responses.append(_response((benchmark, row), answers, place))
    return _problem(first, pair[0], outcome, responses)


def _response(of: Measured, answers: Answers, place: int) -> Response:
    note = answers.notes[place]
    return Response(
        _label(of),
        answers.verdicts[place],
        capped(answers.responses[place]),
        note and capped(note),
        pooled=answers.pooled,
    )


def _problem(answers: Answers, place: int, outcome: str, responses: list[Response]) -> Sample:
    reference = answers.references[place]
    return Sample(
        answers.problem_ids[place],
        outcome,
        capped(answers.prompts[place]),
        None if reference is None else capped(reference),
        responses,
    )


def _label(of: Measured) -> str:
    benchmark, row = of
    threshold = "" if row.threshold is None else f" {row.threshold:g}"
    parts = [benchmark.run, plain(row.model), plain(row.method) + threshold]
    return ", ".join(part for part in parts if part)
