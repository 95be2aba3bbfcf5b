"""Decoding speed: the slow oracle, then each optimization added in turn. One command, one table.

    python -m benchmarks.decoding                        the tiny teacher on its validation problems
    python -m benchmarks.decoding --shape llada-8b       random weights of LLaDA's size, on a GPU

Every round times each row once, so that all rows see the same machine load; numbers are medians over rounds.
`of the limit` is the time of a forward pass at the measured limits of the device (bandwidth and FLOP rate,
measured before and after) divided by its actual time. Peak memory is reported for GPUs only.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from benchmarks.common.hardware import Limits, describe, measure_limits
from benchmarks.common.options import chosen_device, positive
from benchmarks.common.shapes import (
    SHAPES,
    Workload,
    changed,
    random_workload,
    several_blocks,
    teacher_workload,
)
from benchmarks.common.tables import table
from benchmarks.common.timing import DTYPES, Prompts, Row, Timing, first_time, time_once
from benchmarks.decoding_report import COLUMNS, TEXTS, Mark, Result, cpu_marks, gpu_marks, marks_table
from dparallel.config.base import ConfigError
from dparallel.config.decoding import DecodingConfig, parameters_by_name
from dparallel.config.files import parse_yaml
from dparallel.decoding.canvas import Generation
from dparallel.decoding.generate import generate
from dparallel.decoding.oracle import decode_one
from dparallel.models.backbone import DiffusionTransformer
from dparallel.models.loader import release_memory
from dparallel.stages.streams import set_encodings

TEACHER_PROMPTS = 256
LEAST_PROMPTS = 4  # of a random shape, so that one-time costs such as capturing graphs are small
ROOM_FOR_WEIGHTS = 0.7  # share of the free memory; the rest is for activations
NEARLY = 0.95  # the best batch size is the smallest one with this share of the highest throughput
# Settings that the table does not vary itself; no temperature, since the oracle does not sample.
SETTABLE = ("gen_length", "block_length", "rule", *parameters_by_name())


def one_by_one(
    model: DiffusionTransformer, prompts: Prompts, decoding: DecodingConfig, batch_size: int
) -> list[Generation]:
    """Decode with the oracle, one prompt at a time."""
    return [decode_one(model, prompt, decoding) for prompt in prompts]


def batches_that_wait(
    model: DiffusionTransformer, prompts: Prompts, decoding: DecodingConfig, batch_size: int
) -> list[Generation]:
    """Decode in static batches, each of which waits for its slowest row."""
    chunks = (prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size))
    return [generation for chunk in chunks for generation in generate(model, chunk, decoding, batch_size)]


def exact_rows(workload: Workload, batch_sizes: Sequence[int]) -> list[Row]:
    """The oracle, and optimizations of `generate` that keep all tokens, each added to the previous ones."""
    decoding = workload.decoding
    rows = [
        Row("oracle: everything computed", decoding, run=one_by_one),
        Row("generate: only what is read", decoding),
    ]
    if workload.accuracy:
        decoding = changed(decoding, stop_at_eos=True)
        rows.append(Row("+ end-of-text stop", decoding))
    rows.append(Row("+ compile", changed(decoding, compile=True)))
    if not workload.large:
        decoding = changed(decoding, compile=True)
    larger = [size for size in batch_sizes if size > 1]
    rows += [Row("+ batches, refilled", decoding, size) for size in larger]
    if workload.accuracy and larger:
        waiting = 32 if 32 in larger else larger[-1]
        rows.append(Row("batches that wait for their slowest row", decoding, waiting, run=batches_that_wait))
    return rows


def approximate_rows(workload: Workload, vocabulary: int, batch_sizes: Iterable[int]) -> list[Row]:
    """Caches and several active blocks. Few are compiled: most have many shapes, with minutes each."""
    decoding = changed(workload.decoding, stop_at_eos=workload.accuracy is not None)
    several = several_blocks(decoding, vocabulary)
    dual = changed(decoding, cache="dual")
    rows = []
    for size in batch_sizes:
        if size > 1 and not workload.large:
            rows.append(Row("for comparison: not compiled", decoding, size))
        rows += [
            Row("prefix cache", changed(decoding, cache="prefix"), size, exact=False),
            Row("dual cache", dual, size, exact=False),
            Row("several blocks", several, size, exact=False),
            Row("several blocks, dual cache", changed(several, cache="dual"), size, exact=False),
        ]
        if size == 1:
            rows.append(Row("dual cache, compiled", changed(dual, compile=True), exact=False))
    return rows


def best_batch(timings: Iterable[Timing]) -> int:
    """The smallest batch size close to the highest throughput."""
    rates = {timing.row.batch_size: max(timing.rates) for timing in timings if timing.row.run is generate}
    return min(size for size, rate in rates.items() if rate >= NEARLY * max(rates.values()))


def summarise(
    timing: Timing,
    oracle: Timing,
    reference: Sequence[Generation],
    model: DiffusionTransformer,
    limits: Limits,
    accuracy: Callable[[Sequence[Generation]], tuple[float, float]] | None,
) -> Result:
    """The row of the table for a timing.

    Args:
        oracle: the oracle's timing in the same dtype.
        reference: responses whose tokens count as correct.
    """
    row, calls = timing.row, len(timing.forwards)
    memory = [
        limits.memory_seconds(forward, model.config, model.dtype.itemsize) for forward in timing.forwards
    ]
    compute = [limits.compute_seconds(forward, model.config) for forward in timing.forwards]
    share, stderr = accuracy(timing.generations) if accuracy else (None, None)
    paired = zip(timing.rates, oracle.rates, strict=False)  # slow rows have fewer rounds
    return Result(
        name=row.name,
        dtype=str(model.dtype).removeprefix("torch."),
        batch_size=row.batch_size,
        exact=row.exact,
        compiled=row.decoding.compile,
        decoding=row.decoding.model_dump(exclude_none=True),
        seconds=timing.seconds,
        tokens=timing.tokens,
        tokens_per_second=statistics.median(timing.rates),
        ratio=statistics.median(rate / base for rate, base in paired),
        nfe=statistics.mean(generation.nfe for generation in timing.generations),
        forwards=calls,
        ms=statistics.median(timing.seconds) / calls * 1e3,
        limit_ms=sum(map(max, memory, compute)) / calls * 1e3,
        memory_ms=sum(memory) / calls * 1e3,
        compute_bound=sum(compute) > sum(memory),
        peak_bytes=timing.peak_bytes,
        differing=differing_share(timing.generations, reference),
        accuracy=share,
        accuracy_stderr=stderr,
    )


def differing_share(generations: Sequence[Generation], reference: Sequence[Generation]) -> float:
    """Share of the reference's tokens, up to its end, that differ, over the prompts present in both."""
    pairs = list(zip(generations, reference, strict=False))
    differing = sum(
        token != right
        for ours, theirs in pairs
        for token, right in zip(ours.tokens, theirs.tokens[: theirs.num_tokens], strict=False)
    )
    return differing / sum(theirs.num_tokens for _, theirs in pairs)


def measure(
    workload: Workload,
    device: torch.device,
    dtype: torch.dtype,
    batch_sizes: Sequence[int],
    rounds: int,
    prompts: int | None = None,
    reference: Sequence[Generation] | None = None,
    tokens_only: bool = False,
) -> tuple[list[Result], Limits, Sequence[Generation]]:
    """Measure all rows in one dtype.

    Args:
        prompts: prompts per row; by default the row's batch size, but at least `LEAST_PROMPTS`.
        reference: responses for counting differing tokens; by default the oracle's.
        tokens_only: measure only the oracle and plain `generate`, as a reference for other dtypes.

    Returns:
        The rows, the device's limits and the reference.
    """
    limits = measure_limits(device, dtype)
    model = workload.build(device, dtype)

    def first_round(rows: Sequence[Row]) -> list[Timing]:
        counts = [prompts or max(row.batch_size, LEAST_PROMPTS) for row in rows]
        return [
            first_time(model, row, workload.prompts(count)) for row, count in zip(rows, counts, strict=True)
        ]

    if tokens_only:
        timings = first_round(exact_rows(workload, batch_sizes)[:2])
    else:
        timings = first_round(exact_rows(workload, batch_sizes))
        sizes = {1, best_batch(timings)} | ({16} & set(batch_sizes) if device.type == "cuda" else set())
        timings += first_round(approximate_rows(workload, model.config.vocab_size, sorted(sizes)))
    for _ in range(rounds - 1):
        for timing in timings:
            time_once(model, timing)
    limits = limits.or_faster(measure_limits(device, dtype))  # other load may have slowed down the first one

    oracle = timings[0]
    reference = reference or oracle.generations
    judge = workload.accuracy
    results = [summarise(timing, oracle, reference, model, limits, judge) for timing in timings]
    return results, limits, reference


def main(arguments: Sequence[str] | None = None) -> None:
    set_encodings()
    parser = _parser()
    options = parser.parse_args(arguments)
    device = chosen_device(parser, options)
    if options.threads:
        torch.set_num_threads(options.threads)
    workload = random_workload(SHAPES[options.shape]) if options.shape else teacher_workload()
    decoding = _overridden(parser, workload.decoding, options.decoding)
    workload = dataclasses.replace(workload, decoding=decoding)
    prompts = options.prompts or (None if options.shape else TEACHER_PROMPTS)
    batch_sizes = sorted(set(options.batch_sizes))
    if prompts and prompts < batch_sizes[-1]:
        parser.error(
            f"--prompts {prompts} does not fill batches of {batch_sizes[-1]}: give more, or smaller ones"
        )
    dtypes = options.dtype or _dtypes(workload, device)

    machine = describe(device)
    print(" · ".join(f"{name}: {value}" for name, value in machine.items()))
    print(
        f"{options.shape or 'tiny teacher'}, {prompts or 'one batch of'} prompts per row: {_brief(decoding)}"
    )
    results: list[Result] = []
    limits: dict[str, Limits] = {}
    reference: Sequence[Generation] | None = None
    for name in sorted(dtypes, key=list(DTYPES).index):  # float32 first: its tokens are the reference
        tokens_only = workload.large and name == "float32" and len(dtypes) > 1
        rows, limits[name], reference = measure(
            workload, device, DTYPES[name], batch_sizes, options.repeat, prompts, reference, tokens_only
        )
        results += rows
        print(
            f"{name}: {limits[name].bandwidth / 1e9:.0f} GB/s, {limits[name].matrix_rate / 1e9:.0f} GFLOP/s"
        )
        _forget()
    marks: list[Mark] = []
    if options.shape is None and device.type == "cpu":
        marks = cpu_marks(results)
    elif options.shape == "llada-8b" and device.type == "cuda":
        marks = gpu_marks(results)

    print(f"\n{table(results, COLUMNS, TEXTS)}")
    if marks:
        print(f"\n{marks_table(marks)}")
    if options.out:
        record = {
            "machine": machine,
            "shape": options.shape or "tiny teacher",
            "limits": {name: dataclasses.asdict(limit) for name, limit in limits.items()},
            "rows": [result.as_dict() for result in results],
            "marks": [dataclasses.asdict(mark) | {"met": mark.met} for mark in marks],
        }
        Path(options.out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights (default: the tiny teacher)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    parser.add_argument(
        "--dtype", nargs="+", choices=list(DTYPES), help="default: float32, and bfloat16 on a GPU"
    )
    parser.add_argument("--batch-sizes", type=positive, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument(
        "--prompts",
        type=positive,
        help=f"default: {TEACHER_PROMPTS}; with --shape one batch, at least {LEAST_PROMPTS}",
    )
    parser.add_argument(
        "--decoding", nargs="+", default=[], metavar="KEY=VALUE", help=f"of {', '.join(SETTABLE)}"
    )
    parser.add_argument("--repeat", type=positive, default=3, help="rounds; slow rows are timed once")
    parser.add_argument("--threads", type=positive, help="default: torch's choice")
    parser.add_argument("--out", help="also write everything as JSON")
    return parser


def _dtypes(workload: Workload, device: torch.device) -> list[str]:
    """Float32 and bfloat16 on a GPU if float32 fits; only float32 on a CPU."""
    if device.type == "cpu":
        return ["float32"]
    free, _ = torch.cuda.mem_get_info(device)
    fits = workload.weights * torch.float32.itemsize < ROOM_FOR_WEIGHTS * free
    return ["float32", "bfloat16"] if fits else ["bfloat16"]


def _overridden(
    parser: argparse.ArgumentParser, decoding: DecodingConfig, overrides: Sequence[str]
) -> DecodingConfig:
    pairs = [override.partition("=") for override in overrides]
    for key, equals, _ in pairs:
        if not equals or key not in SETTABLE:
            parser.error(f"--decoding {key}{equals}: give KEY=VALUE with a key of {', '.join(SETTABLE)}")
    try:
        return changed(decoding, **{key: parse_yaml(value, key) for key, _, value in pairs})
    except ConfigError as error:
        parser.error(f"--decoding {' '.join(overrides)}: {error}")


def _brief(decoding: DecodingConfig) -> str:
    return ", ".join(f"{key}={value}" for key, value in decoding if key in SETTABLE and value is not None)


def _forget() -> None:
    """Free the model, compiled steps and graphs of a dtype before the next one."""
    torch.compiler.reset()
    release_memory()


if __name__ == "__main__":
    main()
