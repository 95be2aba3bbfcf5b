"""Aggregate samples and verdicts of a model with one decoding."""

from collections.abc import Mapping, Sequence

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveInt

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.canvas import tokens_per_forward
from dparallel.evaluation.metrics import accuracy


class Measurement(BaseModel):
    """Results of a model with one decoding on a set of problems.

    Attributes:
        accuracy, accuracy_stderr: share of correct responses (0..1) by the first metric of the protocol's
            first scorer, and its binomial standard error.
        metrics: share of correct responses (0..1) by metric, over the responses that it judges.
        nfe: mean number of forward passes per sequence.
        tpf, tps: tokens including the end token per forward pass, and per wall second of decoding; the
            seconds of all slices are added, also if several machines decoded them.
        latency: mean wall seconds of decoding a prompt with batch size 1, over the first
            `decode.LATENCY_SAMPLES` problems.
        batch_sizes: batch sizes of all slices, ascending.
        hardware: the hardware of all slices, joined by " + " if it differs.
    """

    model_config = ConfigDict(frozen=True)

    decoding: DecodingConfig
    samples: PositiveInt
    accuracy: float
    accuracy_stderr: float
    metrics: dict[str, float]
    nfe: float
    tpf: float
    tps: float
    latency: NonNegativeFloat
    batch_sizes: tuple[PositiveInt, ...]
    hardware: str


def add_up(
    decoding: DecodingConfig, samples: pa.Table, verdicts: Mapping[str, Sequence[bool | None]]
) -> Measurement:
    """Aggregate all samples of a set of problems.

    Args:
        samples: a table with the columns `store.SAMPLES`.
        verdicts: for every sample, by metric; the first metric is the accuracy.
    """
    columns = {name: samples[name].to_pylist() for name in ("num_tokens", "nfe", "seconds")}
    alone = samples["seconds_alone"].drop_null().to_pylist()
    known = {metric: [flag for flag in flags if flag is not None] for metric, flags in verdicts.items()}
    share, stderr = accuracy(next(iter(known.values())))
    return Measurement(
        decoding=decoding,
        samples=len(samples),
        accuracy=share,
        accuracy_stderr=stderr,
        metrics={metric: accuracy(flags)[0] for metric, flags in known.items() if flags},
        nfe=sum(columns["nfe"]) / len(samples),
        tpf=tokens_per_forward(columns["num_tokens"], columns["nfe"]),
        tps=sum(columns["num_tokens"]) / sum(columns["seconds"]),
        latency=sum(alone) / len(alone),
        batch_sizes=tuple(sorted(set(samples["batch_size"].to_pylist()))),
        hardware=" + ".join(sorted(set(samples["hardware"].to_pylist()))),
    )
