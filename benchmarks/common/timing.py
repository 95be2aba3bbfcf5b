"""Rows of a benchmark of decoding: what is decoded how, and its timings."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.common.hardware import Forward, recorded, timed
from benchmarks.common.shapes import changed
from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.canvas import Generation
from dparallel.decoding.generate import generate
from dparallel.models.backbone import DiffusionTransformer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SLOW_SECONDS = (
    15.0  # slower rows are timed once: their noise averages out, and more rounds would take minutes
)

Prompts = Sequence[Sequence[int]]
Run = Callable[[DiffusionTransformer, Prompts, DecodingConfig, int], list[Generation]]


@dataclass(frozen=True)
class Row:
    """A row of the table. `exact`: tokens must equal the oracle's (in float32)."""

    name: str
    decoding: DecodingConfig
    batch_size: int = 1
    exact: bool = True
    run: Run = generate


@dataclass
class Timing:
    """Measurements of a row: shapes of its forward passes, its responses, seconds of each round."""

    row: Row
    prompts: Prompts
    forwards: list[Forward]
    generations: list[Generation] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens including the first end token; positions filled after it do not count."""
        return sum(generation.num_tokens for generation in self.generations)

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each round."""
        return [self.tokens / seconds for seconds in self.seconds]


def prepare(model: DiffusionTransformer, row: Row, prompts: Prompts) -> Timing:
    """Record the row's forward passes in an uncompiled run, which is also the warm-up; then compile."""
    with recorded(model) as forwards:
        row.run(model, prompts, changed(row.decoding, compile=False), row.batch_size)
    if row.decoding.compile:
        row.run(model, prompts, row.decoding, row.batch_size)
    return Timing(row, prompts, forwards)


def time_once(model: DiffusionTransformer, timing: Timing) -> None:
    """Decode the row's prompts once and record seconds, responses and peak memory."""
    row, cuda = timing.row, model.device.type == "cuda"
    if timing.seconds and timing.seconds[0] > SLOW_SECONDS:
        return
    if cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
    timing.generations, seconds = timed(
        lambda: row.run(model, timing.prompts, row.decoding, row.batch_size), model.device
    )
    timing.seconds.append(seconds)
    if cuda:
        timing.peak_bytes = max(timing.peak_bytes or 0, torch.cuda.max_memory_allocated(model.device))


def first_time(model: DiffusionTransformer, row: Row, prompts: Prompts) -> Timing:
    """Prepare a row and time it once. Its speed is printed at once: a run that is cut off has said it."""
    print(f"{row.name}, batch {row.batch_size} ...", end=" ", file=sys.stderr, flush=True)
    timing = prepare(model, row, prompts)
    time_once(model, timing)
    milliseconds = timing.seconds[0] / len(timing.forwards) * 1e3
    print(f"{timing.rates[0]:.0f} tokens/s, {milliseconds:.2f} ms/forward", file=sys.stderr)
    return timing
