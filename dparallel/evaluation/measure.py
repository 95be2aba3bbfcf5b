"""Aggregate samples and verdicts of a model with one decoding."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveInt

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.canvas import tokens_per_forward
from dparallel.evaluation.metrics import (
    accuracy,
    mean,
    normal_interval,
    number,
    resampled,
    spread,
    t_interval,
    wilson,
)
from dparallel.problems.scorer import FLAG, Measure
from dparallel.stages.manifest import StageError

log = logging.getLogger(__name__)


class Measurement(BaseModel):
    """Results of a model with one decoding on a set of problems.

    Attributes:
        accuracy, accuracy_stderr: the first metric of the protocol's first scorer, and its standard error.
        samples: number of responses.
        repeats: number of responses to every problem, which are judged together.
        metrics: by metric, over the responses that it judges: the share of correct responses (0..1); or their
            mean, or the number of all of them together, as a share of the best value.
        scores: the same of metrics without a best value, or outside their scale, as they are.
        judged: number of these responses by metric.
        graded: metrics with values between 0 and the best one, of which the mean is taken.
        pooled: metrics of all responses together, such as BLEU of a corpus.
        lower_is_better: metrics of which less is better.
        full: the best value of the accuracy, as its scorer gives it.
        stderrs: standard errors of metrics that are no shares of correct responses: sample standard deviation
            divided by √n; of `pooled` ones, the standard deviation of `metrics.RESAMPLES` resamples.
        resamples: the accuracy of these resamples, the same ones for every measurement with as many
            problems; empty if it is not `pooled`.
        nfe: mean number of forward passes per sequence.
        tpf, tps: tokens including the end token per forward pass, and per wall second of decoding; the
            seconds of all slices are added, also if several machines decoded them.
        latency: mean wall seconds of decoding a prompt with batch size 1, over the first
            `decode.LATENCY_SAMPLES` problems.
        batch_sizes: batch sizes of all slices, ascending.
        measured_on: first and last day (UTC) on which samples were decoded, such as `2026-11-25`; a single
            day once; empty if unknown.
        reused: number of samples that other runs decoded before this one, or the one that it resumes, began.
        hardware: the hardware of all slices, joined by " + " if it differs.
        sandbox: how the code of responses was confined when it was judged; empty if none was run.
    """

    model_config = ConfigDict(frozen=True)

    decoding: DecodingConfig
    samples: PositiveInt
    repeats: PositiveInt = 1
    accuracy: float
    accuracy_stderr: float
    metrics: dict[str, float]
    scores: dict[str, float] = {}
    judged: dict[str, PositiveInt] = {}
    graded: tuple[str, ...] = ()
    pooled: tuple[str, ...] = ()
    lower_is_better: tuple[str, ...] = ()
    stderrs: dict[str, float] = {}
    resamples: tuple[float | None, ...] = ()
    full: float = 1.0
    nfe: float
    tpf: float
    tps: float
    latency: NonNegativeFloat
    batch_sizes: tuple[PositiveInt, ...]
    hardware: str
    measured_on: tuple[str, ...] = ()
    reused: NonNegativeInt = 0
    sandbox: str = ""

    def kind(self, metric: str) -> str:
        """How the number of a metric is made: `correct`, `mean` or `pooled`."""
        if metric in self.pooled:
            return "pooled"
        return "mean" if metric in self.graded or metric in self.scores else "correct"

    @property
    def errors(self) -> dict[str, float]:
        """Standard errors of all metrics that are shares."""
        return {
            name: self.stderrs.get(name, _binomial(share, self._count(name)))
            for name, share in self.metrics.items()
        }

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % interval (0..1) of every metric that is a share.

        Wilson's for shares of correct responses, Student's t for means, and a normal one with the standard
        error of the bootstrap for metrics of all responses together.
        """
        return {name: self._interval(name) for name in self.metrics}

    def _interval(self, name: str) -> tuple[float, float]:
        share, count = self.metrics[name], self._count(name)
        if name in self.graded:
            return t_interval(share, self.stderrs[name], count)
        if name in self.pooled:
            return normal_interval(share, self.stderrs[name]) if count > 1 else (0.0, 1.0)
        return wilson(round(share * count), count)

    def _count(self, metric: str) -> int:
        return self.judged.get(metric, self.samples)

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        """95 % interval (0..1) of the accuracy, as `intervals`."""
        return next(iter(self.intervals.values()))

    @property
    def problems(self) -> int:
        """Number of problems that the accuracy is over."""
        return self.judged.get(next(iter(self.metrics)), self.samples)


def add_up(
    decoding: DecodingConfig,
    samples: pa.Table,
    verdicts: Mapping[str, Sequence[Any]],
    stored: int = 0,
    sandbox: str = "",
    measures: Mapping[str, Measure] | None = None,
) -> Measurement:
    """Aggregate all samples of a set of problems.

    Args:
        samples: a table with the columns `store.SAMPLES`.
        verdicts: for every problem, by metric; the first metric is the accuracy.
        stored: number of samples that were stored before.
        sandbox: see `Measurement`.
        measures: what the verdicts of metrics are; by default true or false.

    Raises:
        StageError: the accuracy has no value on its scale.
    """
    columns = {name: samples[name].to_pylist() for name in ("num_tokens", "nfe", "seconds")}
    alone = samples["seconds_alone"].drop_null().to_pylist()
    numbers = _numbers(verdicts, measures or {})
    days = sorted({moment.date().isoformat() for moment in samples["measured_at"].drop_null().to_pylist()})
    return Measurement(
        decoding=decoding,
        samples=len(samples),
        repeats=max(len(samples) // len(next(iter(verdicts.values()))), 1),
        **numbers,
        nfe=sum(columns["nfe"]) / len(samples),
        tpf=tokens_per_forward(columns["num_tokens"], columns["nfe"]),
        tps=sum(columns["num_tokens"]) / sum(columns["seconds"]),
        latency=sum(alone) / len(alone),
        batch_sizes=tuple(sorted(set(samples["batch_size"].to_pylist()))),
        hardware=" + ".join(sorted(set(samples["hardware"].to_pylist()))),
        measured_on=tuple(dict.fromkeys([*days[:1], *days[-1:]])),
        reused=min(stored, len(samples)),
        sandbox=sandbox,
    )


def _numbers(verdicts: Mapping[str, Sequence[Any]], measures: Mapping[str, Measure]) -> dict[str, Any]:
    """The fields of a `Measurement` that follow from verdicts."""
    of = {metric: measures.get(metric, FLAG) for metric in verdicts}
    known = {metric: [value for value in verdicts[metric] if value is not None] for metric in of}
    numbers = {
        metric: found
        for metric, values in known.items()
        if values and (found := _number(metric, of[metric], values)) is not None
    }
    shares = {name: found.value for name, found in numbers.items() if found.is_share}
    first = next(iter(verdicts))
    if first not in shares:
        said = f"is {numbers[first].value:g}" if first in numbers else "has no value"
        raise StageError(
            f"the metric {first!r}, the accuracy, {said} for these responses, not a share of its best value: "
            "make another metric the first one"
        )
    stderrs = {name: found.stderr for name, found in numbers.items() if found.stderr is not None}
    count = len(known[first])
    return {
        "accuracy": shares[first],
        "accuracy_stderr": stderrs.get(first, _binomial(shares[first], count)),
        "metrics": shares,
        "scores": {name: found.value for name, found in numbers.items() if not found.is_share},
        "judged": {name: len(known[name]) for name in numbers},
        "graded": tuple(name for name in shares if name in stderrs and of[name].whole is None),
        "pooled": tuple(name for name in numbers if of[name].whole is not None),
        "lower_is_better": tuple(name for name in numbers if of[name].lower_is_better),
        "stderrs": stderrs,
        "resamples": numbers[first].resamples,
        "full": of[first].full or 1.0,
    }


@dataclass(frozen=True)
class _Number:
    """The number of a metric.

    Attributes:
        is_share: whether it is a share of the best value, 0..1.
        stderr: None for a share of correct responses, whose standard error is binomial.
        resamples: see `Measurement`.
    """

    value: float
    is_share: bool
    stderr: float | None = None
    resamples: tuple[float | None, ...] = ()


def _number(metric: str, measure: Measure, values: list[Any]) -> _Number | None:
    """The number of verdicts that are known; None if they have none."""
    full = measure.full or 1.0
    if measure.whole is None and measure.full is not None and set(values) <= {0, full}:
        return _Number(accuracy([value == full for value in values])[0], True)
    draws: list[float | None] = []
    if measure.whole is None:
        value, stderr = mean([float(value) for value in values])
    else:
        found = number(measure.whole, values)
        if found is None:
            log.warning("%s has no value for these %d responses, and is left out", metric, len(values))
            return None
        draws = resampled(measure.whole, values)
        value, stderr = found, spread(draws)
    if measure.full is None or not 0 <= value <= full:
        return _Number(value, False, stderr)
    resamples = tuple(None if draw is None else draw / full for draw in draws)
    return _Number(value / full, True, stderr / full, resamples)


def _binomial(share: float, count: int) -> float:
    return math.sqrt(share * (1 - share) / count)
