"""What is remembered of a run until it is uploaded: a JSON file, `runs/<experiment>/tracking/<id>.json`.

Written before MLflow hears of the run, so that nothing is lost while its server is away.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from dparallel.stages.files import write_atomically

DEFAULT_STORE = "sqlite:///mlflow.db"
LOCAL_UI = "http://127.0.0.1:5000"  # where `make ui` shows a store that is no server
Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


class Record(BaseModel):
    """All that a run of the tracking server is made from. Times are milliseconds since 1970.

    Args:
        parent: id of the record (in the same folder) whose run this run is a child of.
        folder: the stage's folder: its manifest, `metrics.jsonl` and files belong to the run.
        host, process: the process that does the work; if it is dead while the run is RUNNING, the run was
            killed.
        reused: the stage was done before; its numbers are logged again, its files are not.
        files, metrics: further files, by path, and numbers.
        tracking_uri: the store the run is meant for.
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


def read_record(path: Path) -> Record:
    return Record.model_validate_json(path.read_text(encoding="utf-8"))


def write_record(path: Path, record: Record) -> None:
    write_atomically(path, record.model_dump_json(indent=1))


def tracking_uri(record: Record | None = None) -> str:
    """MLFLOW_TRACKING_URI; where that is unset or empty, the record's own store or the default one."""
    from_environment = os.environ.get("MLFLOW_TRACKING_URI", "").rstrip("/")
    return from_environment or (record.tracking_uri if record else DEFAULT_STORE)


def how_to_open() -> str:
    """The one line that shows the runs in a browser."""
    uri = tracking_uri()
    if uri.startswith("http"):
        return uri
    return f"{Path(sys.executable).with_name('mlflow')} ui --backend-store-uri {uri}"


def now() -> int:
    return int(time.time() * 1000)


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
