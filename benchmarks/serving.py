"""Serving under load: `dparallel serve` with open-loop arrivals, beside `generate` on the same prompts.

    python -m benchmarks.serving                            the tiny teacher on its validation problems
    python -m benchmarks.serving --model M --requests 256   any checkpoint, on prompts of random tokens

Arrivals are a Poisson process that waits for no answer. Its rate is a multiple of what `generate` decodes: at
0.5 the server is half busy, at `all` every request comes at once, so that the batch is full (saturation).

A row's tokens/s are the responses' tokens up to their end token over the time from the first arrival to the
last end. `of generate` compares them with `generate`; where requests come more slowly than it decodes, they
are bounded by the arrivals. On a machine with other work, compare the tokens for each second of CPU time of
the server's process or of this one instead: wall time there says how busy the others were.

Fairness is Jain's index of the seconds that requests took for each forward pass of theirs: 1 if all waited in
proportion to their work, 1 / requests if a single one did.
"""

import argparse
import asyncio
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.common.hardware import describe
from benchmarks.common.options import positive
from benchmarks.common.shapes import TEACHER, teacher_workload
from benchmarks.common.tables import table
from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.generate import generate
from dparallel.models.backbone import DiffusionTransformer
from dparallel.models.checkpoints import checkpoint_folder, load_model
from dparallel.models.defaults import read_defaults
from dparallel.stages.files import write_atomically
from dparallel.stages.streams import set_encodings

LOADS = (0.25, 0.5, 0.75)  # of the throughput of `generate`
PROMPT_LENGTH = 64  # random tokens, for models other than the teacher

Prompts = Sequence[list[int]]


@dataclass(frozen=True)
class Sample:
    """A request: seconds from its arrival to its first text and to its end, tokens, forward passes."""

    first: float
    total: float
    tokens: int
    nfe: int


@dataclass(frozen=True)
class Row:
    """A row of the table; times are in seconds, and missing where a row has no arrivals."""

    name: str
    tokens_per_second: float
    of_generate: float
    per_cpu_second: float
    first_token: float | None = None
    first_token_95: float | None = None
    latency: float | None = None
    latency_95: float | None = None
    latency_99: float | None = None
    fairness: float | None = None
    refused: int = 0


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that is at least as large as `percent` of them."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def jain(values: Sequence[float]) -> float:
    """Jain's fairness index: 1 for equal values, 1 / n if only one of n is above 0."""
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))


def arrivals(count: int, rate: float | None, seed: int = 0) -> list[float]:
    """Times of `count` arrivals of a Poisson process with `rate` per second; all at 0 without a rate."""
    if rate is None:
        return [0.0] * count
    numbers, now, times = random.Random(seed), 0.0, []
    for _ in range(count):
        times.append(now)
        now += numbers.expovariate(rate)
    return times


async def ask(host: str, port: int, body: dict[str, Any]) -> Sample | None:
    """One request, streamed or not; None if the queue is full.

    A client of few instructions: on a small machine, one for people takes its CPU from the server.
    """
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    raw = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}connection: close\r\ncontent-length: {len(raw)}\r\n\r\n".encode() + raw)
    status = int((await reader.readline()).split()[1])
    first, usage = None, None
    async for line in reader:
        if not line.startswith((b"data: {", b"{")):
            continue
        chunk = json.loads(line.removeprefix(b"data: "))
        if "error" in chunk:
            raise RuntimeError(f"the server failed: {chunk['error']}")
        usage = chunk.get("usage")
        if first is None and chunk["choices"]:
            first = time.perf_counter() - started
    writer.close()
    if status == 429:
        return None
    if status != 200 or usage is None:
        raise RuntimeError(f"the server answered {status}, and {'no' if usage is None else 'its'} usage")
    total = time.perf_counter() - started
    return Sample(first or total, total, usage["completion_tokens"], usage["nfe"])


async def load(
    url: str, bodies: Sequence[dict[str, Any]], times: Sequence[float]
) -> tuple[list[Sample | None], float]:
    """Send every body at its time; the results, and the seconds until the last one."""
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")

    async def later(body: dict[str, Any], at: float) -> Sample | None:
        await asyncio.sleep(at)
        return await ask(host, int(port), body)

    started = time.perf_counter()
    results = await asyncio.gather(*(later(body, at) for body, at in zip(bodies, times, strict=True)))
    return results, time.perf_counter() - started


async def one_at_a_time(url: str, bodies: Sequence[dict[str, Any]]) -> tuple[list[Sample | None], float]:
    """Send each body when the previous one is answered."""
    started, results = time.perf_counter(), list[Sample | None]()
    for body in bodies:
        [sample], _ = await load(url, [body], [0.0])
        results.append(sample)
    return results, time.perf_counter() - started


@dataclass(frozen=True)
class Timed:
    """Results of a load, the wall time until the last one, and the CPU time of the server's process.

    Attributes:
        generate: index of the timing of `generate` before it.
    """

    name: str
    results: list[Sample | None]
    seconds: float
    cpu: float
    generate: int


def row_of(timed: Timed, rates: Sequence[float]) -> Row:
    """Statistics of a load; `rates` of `generate`, in tokens per second, of which the next two count."""
    rate = statistics.mean(rates[timed.generate : timed.generate + 2])
    done = [sample for sample in timed.results if sample is not None]
    tokens = sum(sample.tokens for sample in done)
    throughput = tokens / timed.seconds
    first, total = [sample.first for sample in done], [sample.total for sample in done]
    return Row(
        timed.name,
        throughput,
        throughput / rate,
        tokens / timed.cpu,
        statistics.median(first),
        percentile(first, 95),
        statistics.median(total),
        percentile(total, 95),
        percentile(total, 99),
        jain([sample.total / max(1, sample.nfe) for sample in done]),
        len(timed.results) - len(done),
    )


@contextmanager
def server(arguments: Sequence[str]) -> Iterator[tuple[str, Callable[[], float]]]:
    """`dparallel serve` as a process of its own; yields its address, and what reads its CPU time."""
    command = [sys.executable, "-m", "dparallel", "serve", "--port", "0", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8") as process:
        try:
            yield _address(process), partial(_cpu_seconds, psutil.Process(process.pid))
        finally:
            process.terminate()
            process.communicate()


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("Serving "):
            return line.split(" on ")[1].strip()
    raise SystemExit(f"the server did not start:\n{''.join(said)}")


def in_flags(decoding: DecodingConfig) -> list[str]:
    """The options of the command line with which a server decodes so by default."""
    default, flags = DecodingConfig(), list[str]()
    for name, value in decoding.model_dump().items():
        if value != getattr(default, name) and value is not None:
            flag = name.replace("_", "-")
            flags += (
                [f"--{flag}" if value else f"--no-{flag}"]
                if isinstance(value, bool)
                else [f"--{flag}", str(value)]
            )
    return flags


def rates(
    model: DiffusionTransformer, prompts: Prompts, decoding: DecodingConfig, batch_size: int
) -> tuple[float, float]:
    """Tokens of `generate` per second, and per second of CPU time."""
    generate(model, prompts[:batch_size], decoding, batch_size)  # warm-up
    started, cpu = time.perf_counter(), time.process_time()
    generations = generate(model, prompts, decoding, batch_size)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    tokens = sum(generation.num_tokens for generation in generations)
    return tokens / seconds, tokens / cpu


def measure(
    model: DiffusionTransformer,
    path: str,
    prompts: Prompts,
    decoding: DecodingConfig,
    batch_size: int,
    loads: Sequence[float],
    repeat: int = 1,
) -> list[Row]:
    """All rows. `generate` is timed between the rounds, each of which is compared with its neighbours."""
    whole: list[dict[str, Any]] = [{"prompt": prompt} for prompt in prompts]
    bodies = [{**body, "stream": True, "stream_options": {"include_usage": True}} for body in whole]
    alone = max(4, len(prompts) // 8)
    generated = [rates(model, prompts, decoding, batch_size)]  # tokens per second, and per CPU second
    single, cpu_single = rates(model, prompts[:alone], decoding, 1)
    arguments = ["--model", path, "--batch-size", str(batch_size), "--queue", str(len(prompts))]
    measured = list[Timed]()
    with server([*arguments, *in_flags(decoding)]) as (url, cpu_seconds):

        def take(name: str, work: Coroutine[Any, Any, tuple[list[Sample | None], float]]) -> None:
            cpu = cpu_seconds()
            results, seconds = asyncio.run(work)
            measured.append(Timed(name, results, seconds, cpu_seconds() - cpu, len(generated) - 1))

        asyncio.run(load(url, bodies[:batch_size], [0.0] * len(bodies[:batch_size])))  # warm-up
        for _ in range(repeat):
            take("server, all at once", load(url, whole, arrivals(len(bodies), None)))
            take("server, all at once, streamed", load(url, bodies, arrivals(len(bodies), None)))
            generated.append(rates(model, prompts, decoding, batch_size))
        mean = sum(sample.tokens for sample in measured[0].results if sample) / len(bodies)
        for share in loads:
            times = arrivals(len(bodies), share * generated[-1][0] / mean)
            take(f"server, {share:g} of generate, streamed", load(url, bodies, times))
        take("server, one at a time, streamed", one_at_a_time(url, bodies[:alone]))
    generated.append(rates(model, prompts, decoding, batch_size))
    by_second = [rate for rate, _ in generated]
    rate = statistics.mean(by_second)
    return [
        Row(f"generate, batch of {batch_size}", rate, 1.0, statistics.mean(cpu for _, cpu in generated)),
        Row("generate, one at a time", single, single / rate, cpu_single),
        *(row_of(timed, by_second) for timed in measured),
    ]


def _seconds(name: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = getattr(row, name)
        return "" if value is None else f"{value * 1000:.0f}"

    return cell


COLUMNS: dict[str, Callable[[Row], str]] = {
    "requests": lambda row: row.name,
    "tokens/s": lambda row: f"{row.tokens_per_second:.0f}",
    "of generate": lambda row: f"{row.of_generate:.2f}",
    "tokens/CPU s": lambda row: f"{row.per_cpu_second:.0f}",
    "first text, ms": _seconds("first_token"),
    "95 %": _seconds("first_token_95"),
    "latency, ms": _seconds("latency"),
    "95 % ": _seconds("latency_95"),
    "99 %": _seconds("latency_99"),
    "fairness": lambda row: "" if row.fairness is None else f"{row.fairness:.2f}",
    "refused": lambda row: str(row.refused),
}


def main(arguments: Sequence[str] | None = None) -> None:
    set_encodings()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--model", metavar="MODEL", help="checkpoint (default: the tiny teacher)")
    parser.add_argument("--requests", type=positive, default=256, help="default: %(default)s")
    parser.add_argument("--batch-size", type=positive, default=32, help="default: %(default)s")
    parser.add_argument("--gen-length", type=positive, help="of --model (default: 256)")
    parser.add_argument(
        "--loads",
        type=float,
        nargs="*",
        default=LOADS,
        help="of what generate decodes (default: %(default)s)",
    )
    parser.add_argument(
        "--repeat", type=positive, default=3, help="rows of saturation (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="also write the rows as JSON to this file")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.model is None:
        workload, path = teacher_workload(), str(TEACHER)
        prompts = workload.prompts(options.requests)
        decoding = DecodingConfig(**{**workload.decoding.model_dump(), "stop_at_eos": True})
    else:
        path, numbers = options.model, torch.Generator().manual_seed(0)
        stated = {} if options.gen_length is None else {"gen_length": options.gen_length}
        folder = checkpoint_folder(path, with_weights=False)
        decoding = read_defaults(folder).decoding(**stated)  # as the server decodes
    model = load_model(path)
    if options.model is not None:
        highest = model.config.mask_token_id or model.config.vocab_size
        prompts = torch.randint(highest, (options.requests, PROMPT_LENGTH), generator=numbers).tolist()
    rows = measure(model, path, prompts, decoding, options.batch_size, options.loads, options.repeat)
    print(" · ".join(f"{name}: {value}" for name, value in describe(model.device).items()))
    print(f"{len(prompts)} requests, batches of up to {options.batch_size}\n")
    print(table(rows, COLUMNS, {"requests"}))
    if options.out is not None:
        write_atomically(options.out, json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
