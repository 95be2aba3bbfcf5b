"""Decode problems, score them and time it, in slices that add up to one measurement.

A slice is a few batches of consecutive problems, the same ones whoever decodes them, so any number of
machines can share a measurement, and one that stopped goes on. Slices and measurements are named by what
they are made from; they are made once and found again.
"""

import json
import logging
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveInt, ValidationError

from dparallel.config.decoding import DecodingConfig
from dparallel.config.problems import ProblemsConfig
from dparallel.decoding.canvas import Generation, tokens_per_forward
from dparallel.decoding.generate import generate
from dparallel.evaluation.metrics import accuracy
from dparallel.models.backbone import DiffusionTransformer
from dparallel.problems.prompts import encode_problems, finish
from dparallel.problems.registry import load_problems, problems_digest
from dparallel.problems.scoring import accuracy_metric, check_scorable, score
from dparallel.problems.sources import Problem
from dparallel.stages.files import write_atomically
from dparallel.stages.manifest import StageError, digest

log = logging.getLogger(__name__)

LATENCY_SAMPLES = 8
SLICE_BATCHES, SLICE_PROBLEMS = 4, 64  # a slice is so many batches, and of small ones so many problems
SLICE_KEY = b"dparallel_slice"
SAMPLES = pa.schema(
    [
        ("problem_id", pa.string()),
        ("prompt", pa.string()),
        ("reference", pa.string()),
        ("response", pa.string()),
        ("solution", pa.bool_()),
        ("answer", pa.bool_()),  # null where the benchmark has no such score
        ("nfe", pa.int32()),
        ("num_tokens", pa.int32()),
    ]
)


class Measurement(BaseModel):
    """What one model reaches with one decoding on one set of problems.

    Attributes:
        accuracy, accuracy_stderr: share of right solutions (0..1) and its binomial standard error.
        answer_accuracy: share of right final answers; None where the benchmark has no such score.
        nfe: mean forwards per sequence.
        tpf, tps: generated tokens up to EOS per forward, and per wall second of decoding: the seconds
            of all slices, as if one machine had decoded them one after the other.
        latency: mean wall seconds of decoding one prompt alone (batch size 1), over the first
            `LATENCY_SAMPLES` problems.
        hardware: what was timed; slices of several kinds of machine name them all, joined by " + ".
    """

    model_config = ConfigDict(frozen=True)

    decoding: DecodingConfig
    samples: PositiveInt
    accuracy: float
    accuracy_stderr: float
    answer_accuracy: float | None
    nfe: float
    tpf: float
    tps: float
    latency: NonNegativeFloat
    batch_size: PositiveInt
    hardware: str


class Timing(BaseModel):
    """Wall seconds of decoding a slice in batches, and of its first `alone` problems one by one."""

    model_config = ConfigDict(frozen=True)

    seconds: NonNegativeFloat
    alone: int
    seconds_alone: NonNegativeFloat
    hardware: str


Slice = tuple[Timing, pa.Table]  # the table has a row of `SAMPLES` for each problem


@dataclass(frozen=True)
class ProblemSet:
    config: ProblemsConfig
    problems: list[Problem]
    content: str

    @classmethod
    def load(cls, config: ProblemsConfig) -> "ProblemSet":
        """Raise a ProblemsError for a problem that cannot be scored."""
        problems = load_problems(config)
        check_scorable(problems, config.protocol)
        return cls(config, problems, problems_digest(problems))


@dataclass(frozen=True)
class Request:
    """A measurement to make of the model with the fingerprint `made_by`.

    Who measures is no part of it: the hardware is found out and recorded, slice by slice.
    """

    made_by: str
    problems: ProblemSet
    decoding: DecodingConfig
    batch_size: int

    @cached_property
    def made_from(self) -> dict[str, Any]:
        return {
            "model": self.made_by,
            "problems": self.problems.config.model_dump(mode="json"),
            "content": self.problems.content,
            "decoding": self.decoding.model_dump(mode="json"),
            "batch_size": self.batch_size,
            "latency_samples": LATENCY_SAMPLES,
            "slices": [rows.stop for rows in self.slices],  # where one ends the batch drains: part of TPS
        }

    @cached_property
    def name(self) -> str:
        return digest(self.made_from)[:16]

    @cached_property
    def slices(self) -> list[range]:
        """Which problems are decoded together, in slices as even as can be.

        A compiled decoding is not cut: the longest prompt of a slice is part of the shapes it compiles.
        """
        total = len(self.problems.problems)
        count = -(-total // max(SLICE_BATCHES * self.batch_size, SLICE_PROBLEMS))
        if self.decoding.compile:
            count = 1
        return [range(total * each // count, total * (each + 1) // count) for each in range(count)]


def measure_slice(model: DiffusionTransformer, tokenizer: Any, request: Request, rows: range) -> Slice:
    """Decode and score some problems; only decoding is timed, after a warm-up.

    Raises:
        ValueError: a prompt that does not fit the model.
    """
    protocol, decoding = request.problems.config.protocol, request.decoding
    problems = request.problems.problems[rows.start : rows.stop]
    prompts = encode_problems(problems, protocol, tokenizer, model, decoding)
    generations, seconds = _timed(model, prompts, decoding, request.batch_size)
    alone = prompts[: max(LATENCY_SAMPLES - rows.start, 0)]
    _, seconds_alone = _timed(model, alone, decoding, batch_size=1) if alone else ([], 0.0)

    ends = model.config.end_token_ids
    responses = [finish(each.tokens, tokenizer, ends, protocol) for each in generations]
    verdicts = score(problems, responses, protocol)
    samples = [
        {
            "problem_id": problem.problem_id,
            "prompt": problem.prompt,
            "reference": problem.reference,
            "response": response,
            "solution": verdict[accuracy_metric(protocol)],
            "answer": verdict.get("answer"),
            "nfe": generation.nfe,
            "num_tokens": generation.num_tokens,
        }
        for problem, generation, response, verdict in zip(
            problems, generations, responses, verdicts, strict=True
        )
    ]
    timing = Timing(seconds=seconds, alone=len(alone), seconds_alone=seconds_alone, hardware=hardware())
    return timing, pa.Table.from_pylist(samples, schema=SAMPLES)


def add_up(request: Request, slices: Sequence[Slice]) -> tuple[Measurement, pa.Table]:
    """The measurement that all slices of a request make, and their samples in the problems' order."""
    timings = [timing for timing, _ in slices]
    table = pa.concat_tables([samples for _, samples in slices])
    share, stderr = accuracy(table["solution"].to_pylist())
    answers = table["answer"].drop_null().to_pylist()
    num_tokens, nfe = table["num_tokens"].to_pylist(), table["nfe"].to_pylist()
    measurement = Measurement(
        decoding=request.decoding,
        samples=len(table),
        accuracy=share,
        accuracy_stderr=stderr,
        answer_accuracy=accuracy(answers)[0] if answers else None,
        nfe=sum(nfe) / len(nfe),
        tpf=tokens_per_forward(num_tokens, nfe),
        tps=sum(num_tokens) / sum(timing.seconds for timing in timings),
        latency=sum(timing.seconds_alone for timing in timings) / sum(timing.alone for timing in timings),
        batch_size=request.batch_size,
        hardware=" + ".join(sorted({timing.hardware for timing in timings})),
    )
    return measurement, table


def _timed(
    model: DiffusionTransformer, prompts: list[list[int]], decoding: DecodingConfig, batch_size: int
) -> tuple[list[Generation], float]:
    """What `generate` gives, and its wall seconds after a warm-up in the same shape."""
    longest = sorted(prompts, key=len, reverse=True)[:batch_size]
    generate(model, longest, _warm_up(decoding), batch_size)
    began = time.perf_counter()
    generations = generate(model, prompts, decoding, batch_size)
    return generations, time.perf_counter() - began


def _warm_up(decoding: DecodingConfig) -> DecodingConfig:
    """What to decode before the clock starts: everything at once, or as it is where that compiles."""
    if decoding.compile:
        return decoding
    if decoding.mode == "autoregressive":
        return DecodingConfig(mode=decoding.mode, gen_length=min(2, decoding.gen_length))
    return DecodingConfig(
        mode="pipelined" if decoding.looks_back else "sequential",
        gen_length=decoding.gen_length,
        block_length=decoding.gen_length,
        rule="confidence",
        threshold=0.0,
        stop_at_eos=decoding.stop_at_eos,
    )


# On disk: a slice is one Parquet file; a measurement is `<name>.json` and `<name>.parquet`.


def write_slice(path: Path, request: Request, done: Slice) -> None:
    timing, table = done
    stored = json.dumps({"made_from": request.made_from, "timing": timing.model_dump(mode="json")})
    _write_table(path, table.replace_schema_metadata({SLICE_KEY: stored}))


def read_slice(path: Path, request: Request, rows: range) -> Slice | None:
    """A slice that was made, None where there is none; `StageError` for a file that is not that slice."""
    if not path.is_file():
        return None
    try:
        table = pq.read_table(path)
        stored = json.loads((table.schema.metadata or {})[SLICE_KEY])
        timing = Timing.model_validate(stored["timing"])
    except (pa.ArrowInvalid, OSError, KeyError, ValueError) as error:
        raise StageError(f"{path} is damaged: delete it to measure again ({error})") from error
    problems = request.problems.problems[rows.start : rows.stop]
    asked = [problem.problem_id for problem in problems]
    if stored["made_from"] != request.made_from or table["problem_id"].to_pylist() != asked:
        raise StageError(f"{path} was measured from something else: delete it to measure again")
    return timing, table.replace_schema_metadata(None)


class StoredMeasurement(BaseModel):
    made_from: dict[str, Any]
    measurement: Measurement


def store(folder: Path, request: Request, measurement: Measurement, table: pa.Table) -> None:
    _write_table(folder / f"{request.name}.parquet", table)
    stored = StoredMeasurement(made_from=request.made_from, measurement=measurement)
    record = folder / f"{request.name}.json"
    write_atomically(record, stored.model_dump_json(indent=1))  # last: it vouches for the samples


def stored(folder: Path, request: Request) -> Measurement | None:
    """The measurement if it is in `folder`; `StageError` for a record that is damaged or another's."""
    record, samples = folder / f"{request.name}.json", folder / f"{request.name}.parquet"
    if not (record.is_file() and samples.is_file()):
        return None
    try:
        found = StoredMeasurement.model_validate_json(record.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise StageError(f"{record} is damaged: delete it to measure again ({error})") from error
    if found.made_from != request.made_from:
        raise StageError(f"{record} was measured from something else: delete it to measure again")
    return found.measurement


def _write_table(path: Path, table: pa.Table) -> None:
    """A reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    pq.write_table(table, partial, compression="zstd")
    os.replace(partial, path)


def hardware() -> str:
    """What `load_model` puts a model on; timings are only comparable on the same."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{cpu_name()}, threads: {torch.get_num_threads()}"


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"{platform.machine()} CPU"
