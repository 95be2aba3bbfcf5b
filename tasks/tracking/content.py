"""What a run consists of in MLflow: parameters, metrics over time, data sets, tables, files, description."""

import re
import statistics
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import DatasetInput, Metric, Param
from mlflow.exceptions import MlflowException

from dparallel.reporting.headline import tokens
from dparallel.reporting.read import Benchmark, benchmark_name, read_benchmark
from dparallel.stages import metrics_log
from dparallel.stages.manifest import Manifest
from dparallel.stages.metrics_log import METRICS, TIME
from tasks.tracking import datasets
from tasks.tracking.records import Record

PROBLEMS = 50  # of each model and method in a table of samples
TEXT = 2000  # characters of a prompt or response there
NOTE = 8000  # characters of a description; MLflow takes no longer ones on all databases
TRIES = 5  # as many as runs that may register the same data sets at once
NOT_UNIQUE = ("IntegrityError", "UniqueViolation")  # SQLite's and PostgreSQL's
NO_FILES = (".parquet",)  # trajectories are too large for artifacts


def log_beginning(client: MlflowClient, run_id: str, record: Record) -> None:
    """What is known when a run starts."""
    params = [Param(_allowed(key.replace("/", "_")), value) for key, value in record.params.items()]
    for start in range(0, len(params), 100):  # limit of a request
        client.log_batch(run_id, params=params[start : start + 100])


def log_end(client: MlflowClient, run_id: str, record: Record) -> None:
    """What a run of an experiment or of another program ended with."""
    client.log_dict(run_id, record.config, "config.yaml")
    for key, value in record.tags.items():
        client.set_tag(run_id, key, value)
    if record.note:
        client.set_tag(run_id, "mlflow.note.content", record.note[:NOTE])
    # A run that waited for another one knows only now that it reuses that one's result.
    client.set_tag(run_id, "reused", str(record.reused).lower())
    if record.stages:
        if record.reused:
            client.update_run(run_id, name=f"{record.name} (reused)")
        log_inputs(client, run_id, datasets.of_experiment(record.stages))
    if record.stages and record.promotion is not None:
        for folder in record.promotion.benchmarks:
            log_samples(client, run_id, Path(folder))
    for file in record.files:
        client.log_artifact(run_id, file)
    log_numbers(client, run_id, record, record.metrics)
    if record.error is not None:
        client.set_tag(run_id, "error", record.error)


def log_stage(client: MlflowClient, run_id: str, record: Record, folder: Path, manifest: Manifest) -> None:
    """What a finished stage made."""
    lines = metrics_log.read(folder / METRICS)
    numbers = {f"count/{name}": float(count) for name, count in manifest.counts.items()}
    numbers |= {**manifest.metrics, **effort(manifest, folder)}
    curves = {key for line in lines for key in line}  # last values of curves are not logged again
    log_numbers(client, run_id, record, {key: numbers[key] for key in numbers if key not in curves})
    client.log_artifact(run_id, str(folder / "manifest.json"))
    if inputs := datasets.of_stage(manifest, folder, record.inputs):
        log_inputs(client, run_id, inputs)
    if manifest.stage == "benchmark":
        log_samples(client, run_id, folder)
    if manifest.stage == "merging":
        return  # its files are those of the registered model
    for file in manifest.files:
        if not file.endswith(NO_FILES):
            parent = Path(file).parent
            client.log_artifact(run_id, str(folder / file), None if parent == Path() else parent.as_posix())


def log_inputs(client: MlflowClient, run_id: str, inputs: list[DatasetInput]) -> None:
    """Link a run to its data sets; again where another run has registered one of them meanwhile."""
    for others in reversed(range(TRIES)):
        try:
            return client.log_inputs(run_id, inputs)
        except MlflowException as error:
            if others == 0 or not any(kind in str(error) for kind in NOT_UNIQUE):
                raise


def effort(manifest: Manifest, folder: Path) -> dict[str, float]:
    """Wall seconds of the run that finished a stage, and the tokens that it decoded or trained on."""
    found = {"seconds": manifest.seconds}
    if manifest.stage == "trajectories":
        decoded = manifest.metrics.get("tpf", 0.0) * manifest.metrics.get("nfe", 0.0)
        found["tokens"] = float(round(decoded * manifest.counts.get("rows", 0)))
    elif manifest.stage == "training":
        found |= _trained_tokens(manifest, metrics_log.read_with_times(folder / METRICS))
    elif manifest.stage == "benchmark":
        found["tokens"] = float(tokens(list(read_benchmark("", folder).rows)))
    return found


def _trained_tokens(manifest: Manifest, lines: list[dict[str, float]]) -> dict[str, float]:
    """The tokens of a training: the median of those of a step, times the steps.

    A step's follow from the rate and the time since the previous line; between the lines of two attempts
    lies the time in which no process worked, which the median leaves out.
    """
    steps = [
        later["tokens_per_second"] * (later[TIME] - line[TIME]) / (later["train_step"] - line["train_step"])
        for line, later in pairwise(lines)
        if TIME in line and TIME in later and "tokens_per_second" in later
    ]
    count = manifest.counts.get("train_steps")
    return {"tokens": statistics.median(steps) * count} if steps and count else {}


def log_samples(client: MlflowClient, run_id: str, folder: Path) -> None:
    """A table of the first problems, with each method's response, once for a run and benchmark."""
    benchmark = read_benchmark(benchmark_name(folder), folder)
    file = f"samples/{benchmark.name}.json"
    if all(file != there.path for there in client.list_artifacts(run_id, "samples")):
        client.log_table(run_id, pd.DataFrame(samples(benchmark), dtype=object), file)


def samples(benchmark: Benchmark) -> dict[str, list[Any]]:
    """Columns of a table with the first `PROBLEMS` test problems of each row of the results' table."""
    rows: list[dict[str, Any]] = []
    for row in benchmark.reported:
        answers = benchmark.answers(row)
        table = benchmark.samples(row)
        nfe, count = table["nfe"].to_pylist(), table["num_tokens"].to_pylist()
        rows += [
            {
                "problem": answers.problem_ids[place],
                "model": row.model,
                "method": row.method,
                "threshold": row.threshold,
                "correct": answers.verdicts[place],
                "prompt": _cut(answers.prompts[place]),
                "response": _cut(answers.responses[place]),
                "reference": _cut(answers.references[place] or ""),
                "nfe": nfe[place],
                "tokens": count[place],
            }
            for place in range(min(PROBLEMS, len(answers.problem_ids)))
        ]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _cut(text: str) -> str:
    return text if len(text) <= TEXT else f"{text[:TEXT]} … ({len(text) - TEXT:,} characters more)"


def log_lines(client: MlflowClient, run_id: str, record: Record, lines: list[dict[str, Any]]) -> None:
    """Log lines of a metrics log, at the times when they were written.

    Lines of earlier versions have no time; theirs is a function of the step, so that repeated uploads of a
    line coincide.
    """
    metrics = []
    for line in lines:
        step = line["train_step"]
        time_stamp = int(line[TIME] * 1000) if TIME in line else record.started + step
        metrics += [
            Metric(_allowed(key), float(value), time_stamp, step)
            for key, value in line.items()
            if key not in ("train_step", TIME) and isinstance(value, int | float)
        ]
    _log_batches(client, run_id, metrics)


def log_numbers(client: MlflowClient, run_id: str, record: Record, numbers: Mapping[str, float]) -> None:
    """Log numbers that belong to the end of a run."""
    ended = record.ended or record.started
    _log_batches(client, run_id, [Metric(_allowed(key), numbers[key], ended, 0) for key in numbers])


def _log_batches(client: MlflowClient, run_id: str, metrics: Iterable[Metric]) -> None:
    every = list(metrics)
    for start in range(0, len(every), 1000):  # limit of a request
        client.log_batch(run_id, metrics=every[start : start + 1000])


def _allowed(name: str) -> str:
    """A metric or parameter name without the characters that MLflow rejects."""
    return re.sub(r"[^\w\-. :/]", "_", name)
