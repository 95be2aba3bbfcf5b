"""A tracked run: recorded on disk at every change, and uploaded if the tracking server is available."""

import contextlib
import logging
import os
import socket
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from dparallel.stages import metrics_log
from tasks.tracking.links import upload_command
from tasks.tracking.records import (
    Parent,
    Record,
    now,
    one_line,
    read_record,
    tracking_uri,
    without_password,
    write_record,
)
from tasks.tracking.store import check_store
from tasks.tracking.upload import log_lines, promote_record, upload, upload_record, waiting

log = logging.getLogger("dparallel.tracking")

SAMPLING_SECONDS = 10.0  # of CPU, memory, disk, network and GPUs


class Run:
    """A run in progress; `link` is its page, None while the server is not available."""

    def __init__(self, path: Path, record: Record):
        self.path = path
        self.record = record
        self.link: str | None = None
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self._live = True
        self._forwarded: int | None = None
        self._monitor: SystemMetricsMonitor | None = None

    @property
    def as_parent(self) -> Parent:
        """What the stages of this run are told of it."""
        return Parent(
            record=self.record.id,
            name=self.record.name,
            started=self.record.started,
            tracking_uri=self.record.tracking_uri,
            run_id=self.run_id,
            host=self.record.host,
        )

    def update(self, **changes: Any) -> None:
        """Change and write the record, then try to upload it; failed uploads only cause a warning."""
        self.record = self.record.model_copy(update=changes)
        write_record(self.path, self.record)
        try:
            self.run_id, self.experiment_id, self.link = upload_record(self.path)
        except Exception as error:  # no server error may stop the stage
            log.warning(
                "MLflow at %s did not accept the run (%s). It is recorded in %s; upload it later with: %s",
                without_password(tracking_uri(self.record)),
                one_line(error),
                self.path,
                upload_command(self.path.parent.parent),
            )
            self.link, self._live = None, False

    def forward(self, metrics: Path) -> None:
        """Send the lines added to `metrics` since the last call; the upload at the end sends all."""
        if not self._live:
            return
        lines = metrics_log.read_with_times(metrics)
        if self._forwarded is None or self._forwarded > len(lines):
            self._forwarded = len(lines)  # a resumed training may rewrite lines of an earlier attempt
        new = lines[self._forwarded :]
        self._forwarded = len(lines)
        if not new:
            return
        try:
            log_lines(self.record, new)
        except Exception as error:
            log.warning("live metrics stopped (%s); they are uploaded at the end", one_line(error))
            self._live = False

    def monitor(self) -> None:
        """Log the load of this machine until the run ends; only while the server is available."""
        if self.run_id is None or self.record.reused:
            return
        with contextlib.suppress(Exception):  # it is an extra
            logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
            uri = tracking_uri(self.record)
            self._monitor = SystemMetricsMonitor(self.run_id, SAMPLING_SECONDS, tracking_uri=uri)
            self._monitor.start()

    def stop_monitor(self) -> None:
        """End what `monitor` began."""
        if self._monitor is not None:
            with contextlib.suppress(Exception):
                self._monitor.finish()
            self._monitor = None

    def settle(self) -> None:
        """Upload what waits of this experiment, decide on aliases, and say in one line what still waits."""
        home = self.path.parent.parent
        if self.link is not None:
            upload(home, other_processes=False)
            try:
                promote_record(self.path)
            except Exception as error:
                log.warning("the aliases of models are not decided (%s)", one_line(error))
        left = [path for path in waiting(home) if _is_over(path)]
        if left:
            log.warning("%d runs wait for MLflow; upload them with: %s", len(left), upload_command(home))


def _is_over(path: Path) -> bool:
    try:
        return read_record(path).status != "RUNNING"
    except (OSError, ValueError):
        return True


@contextlib.contextmanager
def track(
    home: str | Path,
    stage: str,
    name: str,
    config: dict[str, Any],
    parent: Parent | None = None,
    folder: str | None = None,
    monitored: bool = False,
    **described: Any,
) -> Iterator[Run]:
    """Track the enclosed work as a run of the experiment with the folder `home`.

    The store is that of the parent.

    Args:
        monitored: whether the load of this machine is logged while the work is done.
        described: further attributes of the `Record`, as the other arguments are.

    Raises:
        StoreError: MLFLOW_TRACKING_URI names another store than the parent's, or the parent's is a file of
            another machine.
    """
    if parent is not None:
        check_store(parent)
    record = Record(
        id=f"{datetime.now():%Y%m%d-%H%M%S-%f}-{stage}-{uuid.uuid4().hex[:6]}",
        parent=parent,
        experiment=Path(home).name,
        stage=stage,
        name=name,
        config=config,
        folder=None if folder is None else str(Path(folder).resolve()),
        host=socket.gethostname(),
        process=os.getpid(),
        identity=hash(psutil.Process()),
        started=now(),
        tracking_uri=without_password(tracking_uri(parent)),
        **described,
    )
    run = Run(Path(home).resolve() / "tracking" / f"{record.id}.json", record)
    try:
        run.update()
        if monitored:
            run.monitor()
        yield run
    except BaseException as error:  # cancellation raises a BaseException
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        if status == "FAILED":  # otherwise there is no time to wait for its thread, which ends with the run
            run.stop_monitor()
        try:
            run.update(status=status, error=one_line(error), ended=now())
        except OSError as unwritten:  # such as a full disk; the original error is raised
            log.warning("%s still says that the run goes on (%s)", run.path, one_line(unwritten))
        raise
    run.stop_monitor()
    run.update(status="FINISHED", ended=now())
    if parent is None:
        run.settle()
