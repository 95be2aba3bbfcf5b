"""A tracked run: recorded on disk at every change, and uploaded if the tracking server is available."""

import contextlib
import logging
import os
import socket
import uuid
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from dparallel.stages import metrics_log
from tasks.tracking.records import Parent, Record, now, one_line, tracking_uri, write_record
from tasks.tracking.upload import check_store, log_lines, page, upload_record

log = logging.getLogger("dparallel.tracking")


class Run:
    """A run in progress; `link` is its page, None while the server is not available."""

    def __init__(self, path: Path, record: Record):
        self.path = path
        self.record = record
        self.link: str | None = None
        self.run_id: str | None = None
        self._live = True
        self._forwarded: int | None = None

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
            self.run_id = upload_record(self.path)
            self.link = page(self.record, self.run_id)
        except Exception as error:  # no server error may stop the stage
            log.warning(
                "MLflow at %s did not accept the run (%s). It is recorded in %s; "
                "upload it later with: python -m tasks.tracking upload %s",
                tracking_uri(self.record),
                one_line(error),
                self.path,
                self.path.parent.parent,
            )
            self.link, self._live = None, False

    def forward(self, metrics: Path) -> None:
        """Send the lines added to `metrics` since the last call; the upload at the end sends all."""
        if not self._live:
            return
        lines = metrics_log.read(metrics)
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


@contextlib.contextmanager
def track(
    home: str | Path,
    stage: str,
    name: str,
    config: dict[str, Any],
    parent: Parent | None = None,
    folder: str | None = None,
    reused: bool = False,
    student: str | None = None,
    benchmarks: Iterable[str] = (),
) -> Iterator[Run]:
    """Track the enclosed work as a run of the experiment with the folder `home`.

    The other arguments are attributes of the `Record`. The store is that of the parent.

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
        student=student,
        config=config,
        folder=None if folder is None else str(Path(folder).resolve()),
        reused=reused,
        benchmarks=[str(Path(other).resolve()) for other in benchmarks],
        host=socket.gethostname(),
        process=os.getpid(),
        started=now(),
        tracking_uri=tracking_uri(parent),
    )
    run = Run(Path(home).resolve() / "tracking" / f"{record.id}.json", record)
    try:
        run.update()
        yield run
    except BaseException as error:  # cancellation raises a BaseException
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        try:
            run.update(status=status, error=one_line(error), ended=now())
        except OSError as unwritten:  # such as a full disk; the original error is raised
            log.warning("%s still says that the run goes on (%s)", run.path, one_line(unwritten))
        raise
    run.update(status="FINISHED", ended=now())
