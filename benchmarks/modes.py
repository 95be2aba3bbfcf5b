"""Decoding modes compared with sequential and autoregressive decoding. One command, one table.

    python -m benchmarks.modes --shape llada-8b            random weights of LLaDA's size, on a GPU
    python -m benchmarks.modes --shape tiny-8l             a small shape, on a CPU

Predictions of random weights are nearly uniform, so every row commits a fixed number of tokens per forward
pass (`--commit-share` of a block; one for autoregressive rows). The table shows the costs of forward passes,
not how many tokens a trained model would commit. Revising rows predict the tokens of a block again until it
is full, and take no further forward pass. Autoregressive rows use the same weights as if they
predicted the next token. Every round times each row once; numbers are medians.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.common.hardware import Limits, describe, measure_limits
from benchmarks.common.options import Distinct, chosen_device, positive
from benchmarks.common.shapes import SHAPES, Shape, Workload, changed, random_workload, several_blocks
from benchmarks.common.side_by_side import bare_loop
from benchmarks.common.tables import table
from benchmarks.common.timing import DTYPES, Prompts, Row, Run, Timing, first_time, time_once
from dparallel.config.base import ConfigError, UserError
from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.canvas import Generation
from dparallel.decoding.generate import generate
from dparallel.models.backbone import DiffusionTransformer
from dparallel.stages.streams import set_encodings


@dataclass(frozen=True)
class Result:
    """A row of the table; times are medians over rounds.

    Attributes:
        ratio: tokens per second relative to sequential decoding without cache at the same batch size.
        ms: per call of the model.
        width: mean number of positions computed per row and call.
        of_limit: time of a call at the device's measured limits divided by its actual time.
    """

    name: str
    batch_size: int
    tokens_per_second: float
    ratio: float
    nfe: float
    ms: float
    width: float
    of_limit: float
    peak_bytes: int | None


COLUMNS: dict[str, Callable[[Result], str]] = {
    "decoding": lambda row: row.name,
    "batch": lambda row: str(row.batch_size),
    "tokens/s": lambda row: f"{row.tokens_per_second:.0f}",
    "times sequential": lambda row: f"{row.ratio:.2f}",
    "NFE": lambda row: f"{row.nfe:.1f}",
    "ms/forward": lambda row: f"{row.ms:.2f}",
    "positions/forward": lambda row: f"{row.width:.0f}",
    "of the limit": lambda row: f"{row.of_limit:.0%}",
    "peak GiB": lambda row: "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.1f}",
}


def rows(workload: Workload, vocabulary: int, batch_size: int, add_threshold: float) -> list[Row]:
    """Rows with about the same number of tokens per forward pass, except the autoregressive ones."""
    sequential = workload.decoding
    several = several_blocks(sequential, vocabulary)
    pipelined = changed(several, mode="pipelined", cache="exact", block_add_threshold=add_threshold)
    revising = changed(
        sequential,
        mode="revising",
        rule=several.rule,
        steps=None,
        threshold=several.threshold,
        revision_passes=0,
    )
    tokens = DecodingConfig(mode="autoregressive", gen_length=sequential.gen_length)
    return [
        Row("sequential", sequential, batch_size),
        Row("sequential, dual cache", changed(sequential, cache="dual"), batch_size),
        Row("revising", revising, batch_size),
        Row("revising, dual cache", changed(revising, cache="dual"), batch_size),
        Row("several blocks, dual cache", changed(several, cache="dual"), batch_size),
        Row("pipelined, no cache", changed(pipelined, cache="none"), batch_size),
        Row("pipelined, exact cache", pipelined, batch_size),
        Row("pipelined, compiled", changed(pipelined, compile=True), batch_size),
        Row("autoregressive, exact cache", tokens, batch_size, run=partial(next_tokens, generate)),
        Row("autoregressive, bare loop", tokens, batch_size, run=partial(next_tokens, bare_loop)),
    ]


def next_tokens(
    run: Run, model: DiffusionTransformer, prompts: Prompts, decoding: DecodingConfig, batch_size: int
) -> list[Generation]:
    """Decode with the same weights, as if they predicted the next token."""
    return run(as_next_token_model(model), prompts, decoding, batch_size)


def as_next_token_model(model: DiffusionTransformer) -> DiffusionTransformer:
    """A second model that shares weights and hooks with `model`, with its own configuration.

    Its end token is the mask token, which is never committed, so that all responses have full length.
    """
    twin = copy.copy(model)
    twin.config = copy.copy(model.config)
    twin.config.predicts_next, twin.config.attention_pattern = True, "causal"
    twin.config.eos_token_id = twin.config.mask_token_id
    twin.config.end_token_ids = (twin.config.mask_token_id,)
    return twin


def summarise(timing: Timing, base: Timing, model: DiffusionTransformer, limits: Limits) -> Result:
    """The row of the table for a timing; `base` is sequential decoding without cache."""
    calls, config = len(timing.forwards), model.config
    limit = sum(
        max(
            limits.memory_seconds(forward, config, model.dtype.itemsize),
            limits.compute_seconds(forward, config),
        )
        for forward in timing.forwards
    )
    seconds = statistics.median(timing.seconds)
    return Result(
        name=timing.row.name,
        batch_size=timing.row.batch_size,
        tokens_per_second=statistics.median(timing.rates),
        ratio=statistics.median(rate / other for rate, other in zip(timing.rates, base.rates, strict=False)),
        nfe=statistics.mean(generation.nfe for generation in timing.generations),
        ms=seconds / calls * 1e3,
        width=statistics.mean(forward.width for forward in timing.forwards),
        of_limit=limit / seconds,
        peak_bytes=timing.peak_bytes,
    )


def measure(
    workload: Workload,
    device: torch.device,
    dtype: torch.dtype,
    batch_sizes: Sequence[int],
    add_threshold: float,
    rounds: int,
    compiled: bool = False,
) -> tuple[list[Result], Limits]:
    """Time all rows in alternation, and `compiled` ones too; returns results and device limits."""
    limits = measure_limits(device, dtype)
    model = workload.build(device, dtype)
    timings: dict[int, list[Timing]] = {}
    for batch_size in batch_sizes:
        for row in rows(workload, model.config.vocab_size, batch_size, add_threshold):
            if row.decoding.compile and not compiled:
                continue
            timing = first_time(model, row, workload.prompts(batch_size))
            timings.setdefault(batch_size, []).append(timing)
    everything = [timing for group in timings.values() for timing in group]
    for _ in range(rounds - 1):
        for timing in everything:
            time_once(model, timing)
    limits = limits.or_faster(measure_limits(device, dtype))
    summary = partial(summarise, model=model, limits=limits)
    return [summary(timing, group[0]) for group in timings.values() for timing in group], limits


def committing(shape: Shape, share: float) -> Workload:
    """The workload of a shape in which a forward pass commits `share` of a block."""
    workload = random_workload(shape)
    tokens = round(share * shape.block_length)
    if not tokens or shape.block_length % tokens or abs(tokens - share * shape.block_length) > 1e-6:
        raise ConfigError(
            f"--commit-share {share:g} of a block of {shape.block_length} is "
            f"{share * shape.block_length:g} tokens: give a share whose tokens divide a block, such as "
            f"{1 / shape.block_length:g} or 0.5"
        )
    decoding = changed(workload.decoding, steps=shape.gen_length // tokens)
    return Workload(**{**vars(workload), "decoding": decoding})


def main(arguments: Sequence[str] | None = None) -> None:
    set_encodings()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llada-8b")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--batch-sizes", type=positive, nargs="+", action=Distinct, default=[1, 16])
    parser.add_argument("--commit-share", type=float, default=0.25, help="of a block, in each forward pass")
    parser.add_argument("--block-add-threshold", type=float, default=0.5, help="when the next block opens")
    parser.add_argument("--compile", action="store_true", help="also compiled rows, which take minutes")
    parser.add_argument("--repeat", type=positive, default=3, help="rounds; slow rows are timed once")
    parser.add_argument("--out", help="also write everything as JSON")
    options = parser.parse_args(arguments)
    device = chosen_device(parser, options)
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if not 0 < options.commit_share <= 1 or not 0 < options.block_add_threshold <= 1:
        parser.error("--commit-share and --block-add-threshold are shares: give more than 0, at most 1")
    try:
        workload = committing(SHAPES[options.shape], options.commit_share)
    except UserError as error:
        parser.error(str(error))
    machine = describe(device)
    print(" · ".join(f"{name}: {value}" for name, value in machine.items()))
    results, limits = measure(
        workload,
        device,
        DTYPES[dtype],
        options.batch_sizes,
        options.block_add_threshold,
        options.repeat,
        options.compile,
    )
    print(
        f"{options.shape}, {dtype}, {workload.decoding.gen_length} tokens in blocks of "
        f"{workload.decoding.block_length}, {options.commit_share:g} of a block at each forward; "
        f"{limits.bandwidth / 1e9:.0f} GB/s, {limits.matrix_rate / 1e9:.0f} GFLOP/s\n"
    )
    print(table(results, COLUMNS, texts=["decoding"]))
    if options.out:
        record = {"machine": machine, "options": vars(options), "limits": asdict(limits)}
        rows_as_json = [asdict(result) for result in results]
        Path(options.out).write_text(
            json.dumps(record | {"rows": rows_as_json}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
