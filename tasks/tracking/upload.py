"""Upload records to MLflow. An upload updates a run to the state of its record and can be repeated.

A run is identified by its record's id, a metric by name, step and time. If the server was not available,
`python -m tasks.tracking upload [FOLDER]` uploads what is missing to `MLFLOW_TRACKING_URI` or, if that is not
set, to the store of the record.
"""

import contextlib
import json
import logging
import os
import re
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# A server that is not available must not delay stages: time out after seconds instead of MLflow's minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import psutil
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.exceptions import MlflowException

from dparallel.stages import metrics_log
from dparallel.stages.files import is_there
from dparallel.stages.manifest import MANIFEST, Manifest, read_manifest
from dparallel.stages.metrics_log import METRICS
from tasks.tracking.records import (
    LOCAL_UI,
    Parent,
    Record,
    StoreError,
    one_line,
    read_record,
    tracking_uri,
    write_record,
)
from tasks.tracking.registry import ALIAS, nominate, register

log = logging.getLogger("dparallel.tracking")

RECORD_TAG = "record"
KEEPING = "students_that_keep_the_accuracy"  # detail of a benchmark's manifest


class TrackingError(RuntimeError):
    """The store cannot accept a run; the message names the remedy."""


def upload_record(path: Path) -> str:
    """Update the run of a record, and mark the record if the run is complete; returns the run's id."""
    record = read_record(path)
    client = _client(record)
    run_id = _run_id(client, record)
    _log_params(client, run_id, record.config)
    if record.status == "RUNNING":
        return run_id
    # A run that waited for another one knows only now that it reuses that one's result.
    client.set_tag(run_id, "reused", str(record.reused).lower())
    client.log_dict(run_id, record.config, "config.yaml")
    if record.folder is not None:
        _log_stage(client, run_id, record, Path(record.folder))
    for file in record.files:
        client.log_artifact(run_id, file)
    _log_numbers(client, run_id, record, record.metrics)
    if record.error is not None:
        client.set_tag(run_id, "error", record.error)
    client.set_terminated(run_id, record.status, record.ended)
    write_record(path, record.model_copy(update={"uploaded": tracking_uri(record), "run_id": run_id}))
    return run_id


def log_lines(record: Record, lines: list[dict[str, Any]]) -> None:
    """Log lines of the metrics log of a run in progress."""
    client = _client(record)
    _log_metrics(client, _run_id(client, record), record, lines)


def upload(folder: str | Path, other_hosts: bool = False) -> list[str]:
    """Upload all pending records below `folder`; returns one line for each failure.

    Runs whose process is gone are closed as KILLED. Runs of other hosts are skipped, because their processes
    cannot be checked from here, unless `other_hosts` states that those processes are gone.
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
        except Exception as error:  # a damaged record must not prevent other uploads
            failures.append(f"{path}: {one_line(error)}")
    if not pending and not failures:
        log.info("nothing pending below %s", folder)
    return failures


def page(record: Record, run_id: str) -> str:
    """Address of a run on the tracking server, or on the UI of a local store."""
    uri = tracking_uri(record)
    run = _client(record).get_run(run_id)
    server = uri if uri.startswith("http") else LOCAL_UI
    return f"{server}/#/experiments/{run.info.experiment_id}/runs/{run_id}"


def _live_process(record: Record, other_hosts: bool) -> str | None:
    """The process that works on a running record; processes of other machines are assumed to be alive."""
    if record.host != socket.gethostname():
        return None if other_hosts else f"on host {record.host}; --all closes it all the same"
    with contextlib.suppress(psutil.NoSuchProcess):
        # If the process started after the run, the process id was reused.
        if psutil.Process(record.process).create_time() * 1000 <= record.started:
            return f"process {record.process}"
    return None


def _client(record: Record) -> MlflowClient:
    return MlflowClient(tracking_uri=tracking_uri(record))


def check_store(parent: Parent) -> None:
    """Check that runs of this process go to the store of the parent, as far as that can be told.

    One store may have several addresses, so an address that differs is asked for the parent's run.

    Raises:
        StoreError: they do not.
    """
    uri = tracking_uri(parent)
    file = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
    if uri == parent.tracking_uri:
        if file is not None and parent.host != socket.gethostname() and not file.exists():
            raise StoreError(
                f"the run {parent.name!r} is recorded in {uri}, a file of {parent.host}, which this machine "
                f"({socket.gethostname()}) does not have: start `mlflow server` there, and set "
                "MLFLOW_TRACKING_URI to its address for all commands and workers"
            )
        return
    if file is not None and not file.exists():
        raise _other_store(parent, uri)
    if parent.run_id is not None:
        try:
            MlflowClient(tracking_uri=uri).get_run(parent.run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise _other_store(parent, uri) from error
        except Exception:  # not available now; the upload finds out
            return


def _other_store(parent: Parent, uri: str) -> StoreError:
    return StoreError(
        f"MLFLOW_TRACKING_URI is {uri}, and the run {parent.name!r} that this stage belongs to is in "
        f"{parent.tracking_uri}: set the variable to that store, or unset it: the run hands its store on"
    )


def _run_id(client: MlflowClient, record: Record) -> str:
    """The MLflow run of a record; created (after its parent's) if it does not exist."""
    experiment = client.get_experiment_by_name(record.experiment)
    if experiment and experiment.lifecycle_stage == "deleted":
        raise TrackingError(
            f"experiment {record.experiment!r} is deleted there; restore it: MLFLOW_TRACKING_URI="
            f"{tracking_uri(record)} mlflow experiments restore -x {experiment.experiment_id}"
        )
    experiment_id = experiment.experiment_id if experiment else _new_experiment(client, record.experiment)
    if found := _found(client, experiment_id, record.id):
        return found
    tags = {RECORD_TAG: record.id, "stage": record.stage, "reused": str(record.reused).lower()}
    if record.parent is not None:
        tags["mlflow.parentRunId"] = _parent_run(client, experiment_id, record, record.parent)
    return client.create_run(experiment_id, record.started, tags, record.name).info.run_id


def _parent_run(client: MlflowClient, experiment_id: str, record: Record, parent: Parent) -> str:
    """The run of a record's parent; created if the parent could not do so itself yet."""
    if found := _found(client, experiment_id, parent.record):
        return found
    uri = tracking_uri(record)
    if uri != parent.tracking_uri:
        raise _other_store(parent, uri)
    tags = {RECORD_TAG: parent.record, "stage": "distill", "reused": "false"}
    return client.create_run(experiment_id, parent.started, tags, parent.name).info.run_id


def _found(client: MlflowClient, experiment_id: str, record: str) -> str | None:
    """The run of a record."""
    runs = client.search_runs([experiment_id], f"tags.{RECORD_TAG} = '{record}'", max_results=1)
    return runs[0].info.run_id if runs else None


def _new_experiment(client: MlflowClient, name: str) -> str:
    try:
        return client.create_experiment(name)
    except MlflowException as error:
        experiment = client.get_experiment_by_name(name)
        if error.error_code != "RESOURCE_ALREADY_EXISTS" or experiment is None:
            raise
        return experiment.experiment_id  # another run was faster


def _log_stage(client: MlflowClient, run_id: str, record: Record, folder: Path) -> None:
    lines = metrics_log.read(folder / METRICS)
    _log_metrics(client, run_id, record, lines)
    if record.status != "FINISHED":
        return
    manifest = read_manifest(folder, record.stage)
    numbers = {**{f"count/{name}": count for name, count in manifest.counts.items()}, **manifest.metrics}
    curves = {key for line in lines for key in line}  # last values of curves are not logged again
    _log_numbers(client, run_id, record, {key: numbers[key] for key in numbers if key not in curves})
    client.log_artifact(run_id, str(folder / "manifest.json"))
    if record.stage == "trajectories":
        client.log_inputs(run_id, [_dataset(manifest, folder)])
    if record.stage == "benchmark":
        for name, fingerprint in _candidates(record.benchmarks or [str(folder)]):
            nominate(client, f"{record.experiment}-{name}", fingerprint)
    if record.reused:
        return
    for file in manifest.files:
        if not file.endswith(".parquet"):  # trajectories are too large for artifacts
            client.log_artifact(run_id, str(folder / file), _artifact_folder(record.stage, file))
    if record.stage == "merging":
        register(client, run_id, f"{record.experiment}-{record.student}", manifest.fingerprint)


def _candidates(benchmarks: Sequence[str]) -> list[tuple[str, str]]:
    """Names and fingerprints of the students that keep the accuracy in all benchmarks, once these are done.

    Args:
        benchmarks: folders of the benchmarks.
    """
    unfinished = [folder for folder in benchmarks if not is_there(Path(folder) / MANIFEST)]
    if unfinished:
        log.info("no student becomes %s yet: %s is not finished", ALIAS, ", ".join(unfinished))
        return []
    manifests = [read_manifest(folder, "benchmark") for folder in benchmarks]
    keeping = [
        {(student, manifest.inputs[student]) for student in manifest.details[KEEPING]}
        for manifest in manifests
    ]
    return sorted(
        (student.rpartition("/")[2], fingerprint) for student, fingerprint in set.intersection(*keeping)
    )


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
    for start in range(0, len(params), 100):  # limit of a request
        client.log_batch(run_id, params=params[start : start + 100])


def _log_metrics(client: MlflowClient, run_id: str, record: Record, lines: list[dict[str, Any]]) -> None:
    """Log metrics over train steps; the time is a function of the line, so that repeated uploads coincide."""
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
    for start in range(0, len(metrics), 1000):  # limit of a request
        client.log_batch(run_id, metrics=metrics[start : start + 1000])


def _allowed(name: str) -> str:
    """A metric or parameter name without the characters that MLflow rejects."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _flat(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict) and (value or not prefix):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}{key}.")
    else:
        yield prefix.rstrip("."), value
