"""Decode a set of problems, score it and time it; a measurement is made once and found again."""

import logging
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveInt, ValidationError

from dparallel.config import DecodingConfig, ProblemsConfig
from dparallel.decoding import Generation, generate
from dparallel.evaluation.benchmarks import Problem, load_problems, problems_digest, score
from dparallel.evaluation.metrics import accuracy, tokens_per_forward
from dparallel.evaluation.text import decode_response, encode_problems
from dparallel.manifest import StageError, digest, write_atomically
from dparallel.models.backbone import DiffusionTransformer

log = logging.getLogger(__name__)

Loader = Callable[[], tuple[DiffusionTransformer, Any]]
LATENCY_SAMPLES = 8
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
        tpf, tps: generated tokens up to EOS per forward, and per wall second of decoding.
        latency: mean wall seconds of decoding one prompt alone (batch size 1), over the first
            `LATENCY_SAMPLES` problems.
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


def measure(
    model: DiffusionTransformer,
    tokenizer: Any,
    problems: ProblemsConfig,
    decoding: DecodingConfig,
    batch_size: int,
) -> tuple[Measurement, pa.Table]:
    """Decode and score every problem; only decoding is timed, after a warm-up.

    Returns:
        The measurement, and one row of `SAMPLES` for each problem.

    Raises:
        ValueError: a problem without a reference, or whose prompt does not fit the model.
    """
    loaded = load_problems(problems)
    _check_references(loaded)
    prompts = encode_problems(problems, loaded, tokenizer, model, decoding)
    generations, seconds = _timed(model, prompts, decoding, batch_size)
    alone = prompts[:LATENCY_SAMPLES]
    _, seconds_alone = _timed(model, alone, decoding, batch_size=1)

    samples = []
    for problem, generation in zip(loaded, generations, strict=True):
        response = decode_response(tokenizer, generation.tokens, model.config.eos_token_id)
        judged = score(problems, problem, response)
        samples.append(
            {
                "problem_id": problem.problem_id,
                "prompt": problem.prompt,
                "reference": problem.reference,
                "response": response,
                "solution": judged.solution,
                "answer": judged.answer,
                "nfe": generation.nfe,
                "num_tokens": generation.num_tokens,
            }
        )
    table = pa.Table.from_pylist(samples, schema=SAMPLES)
    share, stderr = accuracy(table["solution"].to_pylist())
    answers = table["answer"].drop_null().to_pylist()
    num_tokens, nfe = table["num_tokens"].to_pylist(), table["nfe"].to_pylist()
    measurement = Measurement(
        decoding=decoding,
        samples=len(samples),
        accuracy=share,
        accuracy_stderr=stderr,
        answer_accuracy=accuracy(answers)[0] if answers else None,
        nfe=sum(nfe) / len(nfe),
        tpf=tokens_per_forward(num_tokens, nfe),
        tps=sum(num_tokens) / seconds,
        latency=seconds_alone / len(alone),
        batch_size=batch_size,
        hardware=hardware(),
    )
    return measurement, table


def _timed(
    model: DiffusionTransformer, prompts: list[list[int]], decoding: DecodingConfig, batch_size: int
) -> tuple[list[Generation], float]:
    """What `generate` gives, and its wall seconds after a warm-up."""
    generate(model, prompts[:batch_size], _warm_up(decoding), batch_size)
    began = time.perf_counter()
    generations = generate(model, prompts, decoding, batch_size)
    return generations, time.perf_counter() - began


def measure_once(
    folder: Path,
    made_by: str,
    load: Loader,
    problems: ProblemsConfig,
    decoding: DecodingConfig,
    batch_size: int,
) -> tuple[Measurement, str]:
    """`measure`, or its stored result if the very same was measured before in `folder`.

    Args:
        made_by: the model's fingerprint.
        load: gives model and tokenizer; called only where something is left to measure.

    Returns:
        The measurement and its name: `<name>.json` and `<name>.parquet` (samples) lie in `folder`.
    """
    made_from = {
        "model": made_by,
        "problems": problems.model_dump(mode="json"),
        "content": problems_digest(load_problems(problems)),
        "decoding": decoding.model_dump(mode="json"),
        "batch_size": batch_size,
        "latency_samples": LATENCY_SAMPLES,
        "hardware": hardware(),
    }
    name = digest(made_from)[:16]
    record, samples = folder / f"{name}.json", folder / f"{name}.parquet"
    if record.is_file() and samples.is_file():
        return _read(record, made_from), name
    model, tokenizer = load()
    measurement, table = measure(model, tokenizer, problems, decoding, batch_size)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{samples.name}.{uuid4().hex}.partial"
    pq.write_table(table, partial, compression="zstd")
    os.replace(partial, samples)
    stored = StoredMeasurement(made_from=made_from, measurement=measurement)
    write_atomically(record, stored.model_dump_json(indent=1))  # last: it vouches for the samples
    return measurement, name


class StoredMeasurement(BaseModel):
    made_from: dict[str, Any]
    measurement: Measurement


def _read(record: Path, made_from: dict[str, Any]) -> Measurement:
    try:
        stored = StoredMeasurement.model_validate_json(record.read_text())
    except ValidationError as error:
        raise StageError(f"{record} is damaged: delete it to measure again ({error})") from error
    if stored.made_from != made_from:
        raise StageError(f"{record} was measured from something else: delete it to measure again")
    return stored.measurement


def hardware() -> str:
    """What `load_model` puts a model on; timings are only comparable on the same."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{cpu_name()}, threads: {torch.get_num_threads()}"


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"{platform.machine()} CPU"


def _warm_up(decoding: DecodingConfig) -> DecodingConfig:
    """What to decode before the clock starts: everything at once, or as it is where that compiles."""
    if decoding.compile:
        return decoding
    return DecodingConfig(
        gen_length=decoding.gen_length,
        block_length=decoding.gen_length,
        rule="confidence",
        threshold=0.0,
        stop_at_eos=decoding.stop_at_eos,
    )


def _check_references(problems: Sequence[Problem]) -> None:
    for problem in problems:
        if problem.reference is None:
            raise ValueError(
                f"problem {problem.problem_id} ({problem.source}) has no reference, so accuracy is unknown; "
                "leave it out or add one"
            )
