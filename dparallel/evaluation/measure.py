"""Aggregate samples and verdicts of a model with one decoding."""

from collections.abc import Mapping, Sequence

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveInt

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.canvas import tokens_per_forward
from dparallel.evaluation.metrics import accuracy, wilson


class Measurement(BaseModel):
    """Results of a model with one decoding on a set of problems.

    Attributes:
        accuracy, accuracy_stderr: share of correct responses (0..1) by the first metric of the protocol's
            first scorer, and its binomial standard error.
        metrics: share of correct responses (0..1) by metric, over the responses that it judges.
        judged: number of these responses by metric.
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
    accuracy: float
    accuracy_stderr: float
    metrics: dict[str, float]
    judged: dict[str, PositiveInt] = {}
    nfe: float
    tpf: float
    tps: float
    latency: NonNegativeFloat
    batch_sizes: tuple[PositiveInt, ...]
    hardware: str
    measured_on: tuple[str, ...] = ()
    reused: NonNegativeInt = 0
    sandbox: str = ""

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Wilson's 95 % interval (0..1) of every metric."""
        counts = {name: self.judged.get(name, self.samples) for name in self.metrics}
        return {
            name: wilson(round(share * counts[name]), counts[name]) for name, share in self.metrics.items()
        }

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval (0..1) of the accuracy."""
        return next(iter(self.intervals.values()))

    @property
    def problems(self) -> int:
        """Number of responses that the accuracy is the share of."""
        return self.judged.get(next(iter(self.metrics)), self.samples)


def add_up(
    decoding: DecodingConfig,
    samples: pa.Table,
    verdicts: Mapping[str, Sequence[bool | None]],
    stored: int = 0,
    sandbox: str = "",
) -> Measurement:
    """Aggregate all samples of a set of problems.

    Args:
        samples: a table with the columns `store.SAMPLES`.
        verdicts: for every sample, by metric; the first metric is the accuracy.
        stored: number of samples that were stored before.
        sandbox: see `Measurement`.
    """
    columns = {name: samples[name].to_pylist() for name in ("num_tokens", "nfe", "seconds")}
    alone = samples["seconds_alone"].drop_null().to_pylist()
    known = {metric: [flag for flag in flags if flag is not None] for metric, flags in verdicts.items()}
    days = sorted({moment.date().isoformat() for moment in samples["measured_at"].drop_null().to_pylist()})
    share, stderr = accuracy(next(iter(known.values())))
    return Measurement(
        decoding=decoding,
        samples=len(samples),
        accuracy=share,
        accuracy_stderr=stderr,
        metrics={metric: accuracy(flags)[0] for metric, flags in known.items() if flags},
        judged={metric: len(flags) for metric, flags in known.items() if flags},
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
