"""Upload records to MLflow. An upload updates a run to the state of its record and can be repeated.

A run is identified by its record's id, a metric by name, step and time. If the server was not available,
`python -m tasks.tracking upload [FOLDER]` uploads what is missing to `MLFLOW_TRACKING_URI` or, if that is not
set, to the store of the record.
"""

import contextlib
import logging
import os
import socket
from pathlib import Path
from typing import Any

import psutil

from dparallel.stages import metrics_log
from dparallel.stages.manifest import read_manifest
from dparallel.stages.metrics_log import METRICS
from tasks.tracking import content, store
from tasks.tracking.records import Record, one_line, read_record, tracking_uri, without_password, write_record
from tasks.tracking.registry import promote, register

log = logging.getLogger("dparallel.tracking")


def upload_record(path: Path) -> tuple[str, str, str]:
    """Update the run of a record, and mark the record if the run is complete.

    A reused stage has no run of its own if the store has the run that made it: that run is returned, and
    named in the tags of the parent.

    Returns:
        Ids of the run and of its experiment, and the address of its page.
    """
    record = read_record(path)
    client = store.client_of(record)
    experiment_id = store.experiment_of(client, record)
    begun = store.found(client, experiment_id, record.id)  # also of one that waited for the run that made it
    maker = store.maker_of(client, experiment_id, record) if record.reused and begun is None else None
    if maker is not None:
        run_id = maker.info.run_id
        if record.parent is not None:
            parent = store.parent_of(client, experiment_id, record, record.parent)
            client.set_tag(parent, f"reused/{record.name}", run_id)
    else:
        run_id = store.run_of(client, experiment_id, record)
        _log(client, experiment_id, run_id, record)
    if record.status != "RUNNING":
        uri = without_password(tracking_uri(record))
        write_record(path, record.model_copy(update={"uploaded": uri, "run_id": run_id}))
    return run_id, experiment_id, store.page(record, experiment_id, run_id)


def _log(client: store.MlflowClient, experiment_id: str, run_id: str, record: Record) -> None:
    """Bring a run to the state of its record."""
    content.log_beginning(client, run_id, record)
    if record.status == "RUNNING":
        return
    if record.folder is not None:
        folder = Path(record.folder)
        content.log_lines(client, run_id, record, metrics_log.read_with_times(folder / METRICS))
        if record.status == "FINISHED":
            manifest = read_manifest(folder, record.stage)
            content.log_stage(client, run_id, record, folder, manifest)
            # The twin that made a model registers it, also if the run that waited for it is uploaded first.
            waited = record.reused and store.twin_of(client, experiment_id, record) is not None
            if record.stage == "merging" and not waited:
                register(client, experiment_id, run_id, record, manifest)
    content.log_end(client, run_id, record)
    client.set_terminated(run_id, record.status, record.ended)


def promote_record(path: Path) -> None:
    """Decide on the aliases of models, after all runs of an experiment are uploaded."""
    record = read_record(path)
    if record.promotion is None or record.promoted or record.status != "FINISHED" or not record.run_id:
        return
    promote(store.client_of(record), record.run_id, record, record.promotion)
    write_record(path, record.model_copy(update={"promoted": True}))


def log_lines(record: Record, lines: list[dict[str, Any]]) -> None:
    """Log lines of the metrics log of a run in progress."""
    client = store.client_of(record)
    run_id = store.run_of(client, store.experiment_of(client, record), record)
    content.log_lines(client, run_id, record, lines)


def waiting(folder: str | Path) -> list[Path]:
    """Records below `folder` that are not uploaded, or cannot be read; the oldest first."""
    found = []
    for path in sorted(Path(folder).glob("**/tracking/*.json")):
        try:
            waits = read_record(path).waits
        except (OSError, ValueError):
            waits = True
        if waits:
            found.append(path)
    return found


def upload(folder: str | Path, other_hosts: bool = False, other_processes: bool = True) -> list[str]:
    """Upload all pending records below `folder`; returns one line for each failure.

    Runs whose process is gone are closed as KILLED. Runs of other hosts are skipped, because their processes
    cannot be checked from here, unless `other_hosts` states that those processes are gone.

    Args:
        other_processes: also upload what other processes finished that still live, and may be uploading it.
    """
    failures, pending = [], waiting(folder)
    for path in pending:
        try:
            _upload_pending(path, other_hosts, other_processes)
        except Exception as error:  # a damaged record must not prevent other uploads
            failures.append(f"{path}: {one_line(error)}")
    for path in pending:
        with contextlib.suppress(OSError, ValueError):  # named above
            if read_record(path).uploaded is None:
                continue
            try:
                promote_record(path)
            except Exception as error:
                failures.append(f"{path}: {one_line(error)}")
    if not pending:
        log.info("nothing pending below %s", folder)
    return failures


def _upload_pending(path: Path, other_hosts: bool, other_processes: bool) -> None:
    record = read_record(path)
    if record.uploaded is not None:
        return
    process = _live_process(record, other_hosts)
    if process is not None and record.status == "RUNNING":
        log.info("skipped %s (running: %s)", record.id, process)
        return
    if process is not None and not other_processes and record.process != os.getpid():
        return
    if record.status == "RUNNING":
        ended = int(path.stat().st_mtime * 1000)
        record = record.model_copy(update={"status": "KILLED", "ended": ended})
        write_record(path, record)
    upload_record(path)
    log.info("uploaded %s (%s)", record.id, record.status.lower())


def _live_process(record: Record, other_hosts: bool) -> str | None:
    """The process that works on a running record; processes of other machines are assumed to be alive."""
    if record.host != socket.gethostname():
        return None if other_hosts else f"on host {record.host}; --all closes it all the same"
    with contextlib.suppress(psutil.NoSuchProcess):
        if hash(psutil.Process(record.process)) == record.identity:  # otherwise its number was used again
            return f"process {record.process}"
    return None
