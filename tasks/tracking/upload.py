"""MLflow, by store and forward: every run is a small record on disk first, then uploaded.

A record (`runs/<experiment>/tracking/<id>.json`) names what belongs to a run; its numbers and
files stay in the stage's folder. Uploading brings the run up to date with its record and may be
repeated: a run is found again by its record's id, a metric by name, step and time. So if the
server is away nothing is lost, and `python -m tasks.tracking upload [FOLDER]` catches up, at
`MLFLOW_TRACKING_URI` or, where that is unset, at the store that the record was meant for.
"""

import argparse
import contextlib
import json
import logging
import os
import re
import socket
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

# A server that is away must not hold up a stage: give up after seconds, not MLflow's minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import psutil
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.exceptions import MlflowException
from pydantic import BaseModel, ConfigDict

from dparallel.stages import metrics_log
from dparallel.stages.files import write_atomically
from dparallel.stages.manifest import Manifest, read_manifest
from dparallel.stages.metrics_log import METRICS

logger = logging.getLogger("dparallel.tracking")

DEFAULT_STORE = "sqlite:///mlflow.db"
LOCAL_UI = "http://127.0.0.1:5000"  # where `make ui` shows a store that is no server
RECORD_TAG = "record"
ALIAS = "candidate"
Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


class TrackingError(RuntimeError):
    """A run that the store cannot take; the message says what to do."""


class Record(BaseModel):
    """All that a run of the tracking server is made from. Times are milliseconds since 1970.

    Args:
        parent: id of the record (in the same folder) whose run this one is a child of.
        folder: the stage's folder: its manifest, `metrics.jsonl` and files belong to the run.
        host, process: who works on it; dead while the run is RUNNING, the run was killed.
        reused: the stage was done before; its numbers are logged, its files are not again.
        files, metrics: further files, by path, and numbers.
        tracking_uri: the store it is meant for.
        uploaded: the store that has all of it.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    parent: str | None
    experiment: str
    stage: str
    name: str
    student: str | None = None
    config: dict[str, Any]
    folder: str | None = None
    reused: bool = False
    files: list[str] = []
    metrics: dict[str, float] = {}
    host: str = ""
    process: int = 0
    started: int
    ended: int | None = None
    status: Status = "RUNNING"
    error: str | None = None
    tracking_uri: str = DEFAULT_STORE
    uploaded: str | None = None


class Run:
    """A run that is going on; `link` is its page, None while its store is away."""

    def __init__(self, path: Path, record: Record):
        self.path = path
        self.record = record
        self.id = record.id
        self.link: str | None = None
        self._live = True
        self._forwarded: int | None = None

    def update(self, **changes: Any) -> None:
        """Write the changed record, then try to upload it; a server that is away is only a warning."""
        self.record = self.record.model_copy(update=changes)
        _write(self.path, self.record)
        try:
            self.link = _page(self.record, upload_record(self.path))
        except Exception as error:  # whatever ails the server, the stage's work must not be lost
            logger.warning(
                "MLflow at %s did not take the run (%s). It is recorded in %s; "
                "upload it later with: python -m tasks.tracking upload %s",
                tracking_uri(self.record),
                _one_line(error),
                self.path,
                self.path.parent.parent,
            )
            self.link, self._live = None, False

    def forward(self, metrics: Path) -> None:
        """Send lines that `metrics` has gained since the last call; the upload at the end sends all."""
        if not self._live:
            return
        lines = metrics_log.read(metrics)
        if self._forwarded is None or self._forwarded > len(lines):
            self._forwarded = len(lines)  # of an earlier attempt, which a resumed training may rewrite
        try:
            client = _client(self.record)
            _log_metrics(client, _run_id(client, self.path), self.record, lines[self._forwarded :])
        except Exception as error:
            logger.warning("live metrics stopped (%s); they are uploaded at the end", _one_line(error))
            self._live = False
        self._forwarded = len(lines)


@contextlib.contextmanager
def run(
    home: str | Path,
    stage: str,
    name: str,
    config: dict[str, Any],
    parent: str | None = None,
    folder: str | None = None,
    reused: bool = False,
    student: str | None = None,
) -> Iterator[Run]:
    """Track what happens inside as one run of the experiment whose folder is `home`."""
    record = Record(
        id=f"{datetime.now():%Y%m%d-%H%M%S}-{stage}-{uuid.uuid4().hex[:6]}",
        parent=parent,
        experiment=Path(home).name,
        stage=stage,
        name=name,
        student=student,
        config=config,
        folder=None if folder is None else str(Path(folder).resolve()),
        reused=reused,
        host=socket.gethostname(),
        process=os.getpid(),
        started=_now(),
        tracking_uri=tracking_uri(),
    )
    current = Run(Path(home).resolve() / "tracking" / f"{record.id}.json", record)
    current.update()
    try:
        yield current
    except BaseException as error:  # a cancelled run raises no Exception
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        current.update(status=status, error=_one_line(error), ended=_now())
        raise
    current.update(status="FINISHED", ended=_now())


def tracking_uri(record: Record | None = None) -> str:
    """MLFLOW_TRACKING_URI; where that is unset or empty, the record's own store or the default one."""
    asked = os.environ.get("MLFLOW_TRACKING_URI", "").rstrip("/")
    return asked or (record.tracking_uri if record else DEFAULT_STORE)


def how_to_open() -> str:
    """The one line that shows the runs in a browser."""
    uri = tracking_uri()
    if uri.startswith("http"):
        return uri
    return f"{Path(sys.executable).with_name('mlflow')} ui --backend-store-uri {uri}"


def upload_record(path: Path) -> str:
    """Bring one record's run up to date, mark the record once it is complete there; returns the run's id."""
    record = _read(path)
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
    _write(path, record.model_copy(update={"uploaded": tracking_uri(record)}))
    return run_id


def upload(folder: str | Path, other_hosts: bool = False) -> list[str]:
    """Upload every pending record below `folder`; returns a line for each that did not go through.

    A run whose process is gone is closed as KILLED; one of another host is left alone, because its
    process cannot be seen from here, unless `other_hosts` says that nobody works on those either.
    """
    failures, pending = [], 0
    for path in sorted(Path(folder).glob("**/tracking/*.json")):
        try:
            record = _read(path)
            if record.uploaded:
                continue
            pending += 1
            if record.status == "RUNNING":
                if who := _worked_on_by(record, other_hosts):
                    logger.info("skipped %s (running: %s)", record.id, who)
                    continue
                ended = int(path.stat().st_mtime * 1000)
                record = record.model_copy(update={"status": "KILLED", "ended": ended})
                _write(path, record)
            upload_record(path)
            logger.info("uploaded %s (%s)", record.id, record.status.lower())
        except Exception as error:  # one damaged folder must not keep the others back
            failures.append(f"{path}: {_one_line(error)}")
    if not pending and not failures:
        logger.info("nothing pending below %s", folder)
    return failures


def _page(record: Record, run_id: str) -> str:
    """A run's page on the tracking server, or on the UI of a local store once it is opened."""
    uri = tracking_uri(record)
    run = _client(record).get_run(run_id)
    server = uri if uri.startswith("http") else LOCAL_UI
    return f"{server}/#/experiments/{run.info.experiment_id}/runs/{run_id}"


def _worked_on_by(record: Record, other_hosts: bool) -> str | None:
    """Who still works on a running record; of another machine's processes we cannot tell."""
    if record.host != socket.gethostname():
        return None if other_hosts else f"on host {record.host}; --all closes it all the same"
    with contextlib.suppress(psutil.NoSuchProcess):
        # One that began later has only been given the same number.
        if psutil.Process(record.process).create_time() * 1000 <= record.started:
            return f"process {record.process}"
    return None


def _client(record: Record) -> MlflowClient:
    return MlflowClient(tracking_uri=tracking_uri(record))


def _run_id(client: MlflowClient, path: Path) -> str:
    """The run of a record, created (after its parent's) if the server does not have it yet."""
    record = _read(path)
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
    if record.reused:
        return
    for file in manifest.files:
        if not file.endswith(".parquet"):  # trajectories are data, not a result to look at
            client.log_artifact(run_id, str(folder / file), _artifact_folder(record.stage, file))
    if record.stage == "merging":
        _register(client, run_id, f"{record.experiment}-{record.student}")


def _artifact_folder(stage: str, file: str) -> str | None:
    parents = [*(["model"] if stage == "merging" else []), *Path(file).parent.parts]
    return "/".join(parents) or None


def _register(client: MlflowClient, run_id: str, model: str) -> None:
    """A new version of the registered `model`, once per run; the newest carries the alias."""
    if client.search_model_versions(f"run_id = '{run_id}'"):
        return
    try:
        client.get_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(model)
    source = f"{client.get_run(run_id).info.artifact_uri}/model"
    version = client.create_model_version(model, source, run_id)
    client.set_registered_model_alias(model, ALIAS, version.version)


def _dataset(manifest: Manifest, folder: Path) -> DatasetInput:
    problems = manifest.config["problems"]
    dataset = Dataset(
        name=f"{problems['benchmark']}-{problems['split']}",
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
        for key, each in value.items():
            yield from _flat(each, f"{prefix}{key}.")
    else:
        yield prefix.rstrip("."), value


def _read(path: Path) -> Record:
    return Record.model_validate_json(path.read_text(encoding="utf-8"))


def _write(path: Path, record: Record) -> None:
    write_atomically(path, record.model_dump_json(indent=1))


def _now() -> int:
    return int(time.time() * 1000)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tasks.tracking", description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["upload"])
    parser.add_argument("folder", nargs="?", default="runs", help="where to look for records (runs)")
    parser.add_argument("--all", action="store_true", help="also close runs of other hosts as killed")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO)
    if not Path(arguments.folder).is_dir():
        print(f"error: {arguments.folder}: no such folder (looked in {Path.cwd()})", file=sys.stderr)
        sys.exit(2)
    failures = upload(arguments.folder, arguments.all)
    if failures:
        sys.exit("still pending:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
