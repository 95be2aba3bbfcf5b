"""Records to MLflow. Uploading brings a run up to date with its record and may be repeated.

A run is found again by its record's id, a metric by name, step and time. So if the server is away nothing
is lost: `python -m tasks.tracking upload [FOLDER]` catches up, at `MLFLOW_TRACKING_URI` or, where that is
unset, at the store that the record was meant for.
"""

import contextlib
import json
import logging
import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# A server that is away must not hold up a stage: give up after seconds, not MLflow's minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import psutil
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

from dparallel.stages import metrics_log
from dparallel.stages.manifest import Manifest, read_manifest
from dparallel.stages.metrics_log import METRICS
from tasks.tracking.records import LOCAL_UI, Record, one_line, read_record, tracking_uri, write_record
from tasks.tracking.registry import nominate, register

log = logging.getLogger("dparallel.tracking")

RECORD_TAG = "record"


class TrackingError(RuntimeError):
    """A run that the store cannot take; the message says what to do."""


def upload_record(path: Path) -> str:
    """Bring one record's run up to date, mark the record once it is complete there; returns the run's id."""
    record = read_record(path)
    client = _client(record)
    run_id = _run_id(client, path)
    _log_params(client, run_id, record.config)
    if record.status == "RUNNING":
        return run_id
    client.log_dict(run_id, record.config, "config.yaml")
    if record.folder is not None:
        _log_stage(client, run_id, record, Path(record.folder))
    for file in record.files:
        client.log_artifact(run_id, file)
    _log_numbers(client, run_id, record, record.metrics)
    if record.error is not None:
        client.set_tag(run_id, "error", record.error)
    client.set_terminated(run_id, record.status, record.ended)
    write_record(path, record.model_copy(update={"uploaded": tracking_uri(record)}))
    return run_id


def log_lines(path: Path, record: Record, lines: list[dict[str, Any]]) -> None:
    """Send some lines of the metrics log of a run that is going on."""
    client = _client(record)
    _log_metrics(client, _run_id(client, path), record, lines)


def upload(folder: str | Path, other_hosts: bool = False) -> list[str]:
    """Upload every pending record below `folder`; returns one line for each record that did not go through.

    A run whose process is gone is closed as KILLED. A run of another host is left alone, because its
    process cannot be seen from here, unless `other_hosts` says that those processes are gone too.
    """
    failures, pending = [], 0
    for path in sorted(Path(folder).glob("**/tracking/*.json")):
        try:
            record = read_record(path)
            if record.uploaded:
                continue
            pending += 1
            if record.status == "RUNNING":
                if process := _live_process(record, other_hosts):
                    log.info("skipped %s (running: %s)", record.id, process)
                    continue
                ended = int(path.stat().st_mtime * 1000)
                record = record.model_copy(update={"status": "KILLED", "ended": ended})
                write_record(path, record)
            upload_record(path)
            log.info("uploaded %s (%s)", record.id, record.status.lower())
        except Exception as error:  # one damaged folder must not keep the others back
            failures.append(f"{path}: {one_line(error)}")
    if not pending and not failures:
        log.info("nothing pending below %s", folder)
    return failures


def page(record: Record, run_id: str) -> str:
    """A run's page on the tracking server, or on the UI of a local store once it is opened."""
    uri = tracking_uri(record)
    run = _client(record).get_run(run_id)
    server = uri if uri.startswith("http") else LOCAL_UI
    return f"{server}/#/experiments/{run.info.experiment_id}/runs/{run_id}"


def _live_process(record: Record, other_hosts: bool) -> str | None:
    """The process that still works on a running record; another machine's is taken to be alive."""
    if record.host != socket.gethostname():
        return None if other_hosts else f"on host {record.host}; --all closes it all the same"
    with contextlib.suppress(psutil.NoSuchProcess):
        # A process that began after the run was given the number of the run's dead process.
        if psutil.Process(record.process).create_time() * 1000 <= record.started:
            return f"process {record.process}"
    return None


def _client(record: Record) -> MlflowClient:
    return MlflowClient(tracking_uri=tracking_uri(record))


def _run_id(client: MlflowClient, path: Path) -> str:
    """The run of a record, created (after its parent's) if the server does not have it yet."""
    record = read_record(path)
    experiment = client.get_experiment_by_name(record.experiment)
    if experiment and experiment.lifecycle_stage == "deleted":
        raise TrackingError(
            f"experiment {record.experiment!r} is deleted there; restore it: MLFLOW_TRACKING_URI="
            f"{tracking_uri(record)} mlflow experiments restore -x {experiment.experiment_id}"
        )
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(record.experiment)
    found = client.search_runs([experiment_id], f"tags.{RECORD_TAG} = '{record.id}'", max_results=1)
    if found:
        return found[0].info.run_id
    tags = {RECORD_TAG: record.id, "stage": record.stage, "reused": str(record.reused).lower()}
    if record.parent is not None:
        tags["mlflow.parentRunId"] = _run_id(client, path.with_name(f"{record.parent}.json"))
    return client.create_run(experiment_id, record.started, tags, record.name).info.run_id


def _log_stage(client: MlflowClient, run_id: str, record: Record, folder: Path) -> None:
    lines = metrics_log.read(folder / METRICS)
    _log_metrics(client, run_id, record, lines)
    if record.status != "FINISHED":
        return
    manifest = read_manifest(folder, record.stage)
    numbers = {**{f"count/{name}": count for name, count in manifest.counts.items()}, **manifest.metrics}
    curves = {key for line in lines for key in line}  # a curve's last value needs no second mention
    _log_numbers(client, run_id, record, {key: numbers[key] for key in numbers if key not in curves})
    client.log_artifact(run_id, str(folder / "manifest.json"))
    if record.stage == "trajectories":
        client.log_inputs(run_id, [_dataset(manifest, folder)])
    if record.stage == "benchmark":
        for student in manifest.details["students_that_keep_the_accuracy"]:
            name = student.rpartition("/")[2]
            nominate(client, f"{record.experiment}-{name}", manifest.inputs[student])
    if record.reused:
        return
    for file in manifest.files:
        if not file.endswith(".parquet"):  # trajectories are data, not a result to look at
            client.log_artifact(run_id, str(folder / file), _artifact_folder(record.stage, file))
    if record.stage == "merging":
        register(client, run_id, f"{record.experiment}-{record.student}", manifest.fingerprint)


def _artifact_folder(stage: str, file: str) -> str | None:
    parents = Path("model" if stage == "merging" else "") / Path(file).parent
    return None if parents == Path() else parents.as_posix()


def _dataset(manifest: Manifest, folder: Path) -> DatasetInput:
    problems = manifest.config["problems"]
    dataset = Dataset(
        name=", ".join(source["path"] for source in problems["sources"]) or f"coins-{problems['split']}",
        digest=manifest.fingerprint[:36],
        source_type="local",
        source=json.dumps({"uri": str(folder)}),
        profile=json.dumps(manifest.counts),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "distillation")])


def _log_params(client: MlflowClient, run_id: str, config: dict[str, Any]) -> None:
    params = [Param(_allowed(key.replace("/", "_")), str(value)) for key, value in _flat(config)]
    for start in range(0, len(params), 100):  # the server's limit for one request
        client.log_batch(run_id, params=params[start : start + 100])


def _log_metrics(client: MlflowClient, run_id: str, record: Record, lines: list[dict[str, Any]]) -> None:
    """Metrics over train steps; a line's time depends on the line alone, so that repeats coincide."""
    metrics = []
    for line in lines:
        step = line["train_step"]
        time_stamp = record.started + step
        metrics += [
            Metric(_allowed(key), float(value), time_stamp, step)
            for key, value in line.items()
            if key != "train_step" and isinstance(value, int | float)
        ]
    _log_batches(client, run_id, metrics)


def _log_numbers(client: MlflowClient, run_id: str, record: Record, numbers: dict[str, float]) -> None:
    ended = record.ended or record.started
    _log_batches(client, run_id, [Metric(_allowed(key), numbers[key], ended, 0) for key in numbers])


def _log_batches(client: MlflowClient, run_id: str, metrics: list[Metric]) -> None:
    for start in range(0, len(metrics), 1000):  # the server's limit for one request
        client.log_batch(run_id, metrics=metrics[start : start + 1000])


def _allowed(name: str) -> str:
    """A name of a metric or param without the characters that MLflow refuses."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _flat(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict) and (value or not prefix):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}{key}.")
    else:
        yield prefix.rstrip("."), value
