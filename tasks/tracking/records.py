"""Records of runs until they are uploaded: JSON files `runs/<experiment>/tracking/<id>.json`.

A record is written before MLflow is contacted, so that nothing is lost while the server is not available.
"""

import os
import re
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from dparallel.config.base import UserError
from dparallel.config.experiment import PromotionConfig
from dparallel.stages.files import write_atomically

DEFAULT_STORE = "sqlite:///mlflow.db"
SQLITE = "sqlite:///"
Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


class StoreError(UserError):
    """A run is to be recorded in another store than its parent; the message names both and the remedy."""


class Parent(BaseModel):
    """What the stages of a `distill` run are told of it, in whichever process and on whichever machine.

    Attributes:
        record: id of its record, by which its run is found in the store, or created if it is not there yet.
        name: name of its run.
        started: when it started, in milliseconds since 1970.
        tracking_uri: its store.
        run_id: its run in that store; None while the store is not available.
        host: where it runs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    record: str
    name: str
    started: int
    tracking_uri: str
    run_id: str | None = None
    host: str = ""


class Promotion(BaseModel):
    """What decides on the aliases of an experiment's models.

    Attributes:
        benchmarks: folders of all benchmarks of the experiment.
        settings: when a student becomes the champion.
    """

    model_config = ConfigDict(frozen=True)

    benchmarks: list[str]
    settings: PromotionConfig = PromotionConfig()

    def here(self) -> "Promotion":
        """The same, with folders that mean the same in all working folders of this machine."""
        return self.model_copy(update={"benchmarks": [os.path.abspath(folder) for folder in self.benchmarks]})


class Record(BaseModel):
    """Everything that makes up a run of the tracking server. Times are milliseconds since 1970.

    Attributes:
        parent: the parent run.
        config: all settings, which become `config.yaml`.
        params: the few that people compare by.
        tags: further tags.
        note: description of the run as Markdown.
        inputs: folders of the stage's inputs, by name.
        folder: the stage's folder, whose manifest, `metrics.jsonl` and files belong to the run.
        stages: of an experiment: folders of its stages.
        reused: whether the stage was already finished when the run started, or all stages of the experiment.
            Such a stage gets no run of its own if the store has the run that made it.
        files, metrics: further files (paths) and metrics.
        promotion: of a run that ends with the measurements of an experiment: what decides on aliases.
        promoted: whether that was decided.
        host, process, identity: the process that does the work; its identity tells it from a later process
            with the same number. If it is gone while the run is RUNNING, the run was killed.
        tracking_uri: the store that the run is meant for.
        uploaded: the store to which the complete run was uploaded.
        run_id: id of the run in that store, by which `dparallel compare` finds `folder` or `files`.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    parent: Parent | None
    experiment: str
    stage: str
    name: str
    student: str | None = None
    config: dict[str, Any]
    params: dict[str, str] = {}
    tags: dict[str, str] = {}
    note: str = ""
    inputs: dict[str, str] = {}
    folder: str | None = None
    stages: list[str] = []
    reused: bool = False
    files: list[str] = []
    metrics: dict[str, float] = {}
    promotion: Promotion | None = None
    promoted: bool = False
    host: str = ""
    process: int = 0
    identity: int = 0
    started: int
    ended: int | None = None
    status: Status = "RUNNING"
    error: str | None = None
    tracking_uri: str = DEFAULT_STORE
    uploaded: str | None = None
    run_id: str | None = None

    @property
    def waits(self) -> bool:
        """Whether something of it is still to be uploaded or decided."""
        return self.uploaded is None or (self.promotion is not None and not self.promoted)


def read_record(path: Path) -> Record:
    """Read a record from its file."""
    return Record.model_validate_json(path.read_text(encoding="utf-8"))


def write_record(path: Path, record: Record) -> None:
    """Write a record to its file, atomically."""
    write_atomically(path, record.model_dump_json(indent=1))


def tracking_uri(of: Record | Parent | None = None) -> str:
    """MLFLOW_TRACKING_URI; if it is not set, the store of the record or parent, or the default store."""
    from_environment = os.environ.get("MLFLOW_TRACKING_URI", "").rstrip("/")
    return anywhere(from_environment or (of.tracking_uri if of else DEFAULT_STORE))


def anywhere(uri: str) -> str:
    """A store's URI that means the same in all working folders."""
    return f"{SQLITE}{os.path.abspath(uri.removeprefix(SQLITE))}" if uri.startswith(SQLITE) else uri


def without_password(text: str) -> str:
    """A URI, or a text with URIs, as recorded and printed; the password is taken from the environment."""
    shown = re.sub(r"(https?://)[^/:@\s]+@", r"\1…@", text)  # a name alone may be a token
    shown = re.sub(r"(://[^/:@\s]*):[^/\s]*@", r"\1@", shown)
    shown = re.sub(r"(sql[\w+]*://[^/:@\s]*):\S*@", r"\1@", shown)  # there, it may hold slashes
    secret = r"(?:\w*password|passwd|pwd|\w*token|\w*secret|\w*key)"
    return re.sub(rf"([?&]{secret}=)[^&\s]*", r"\1…", shown, flags=re.IGNORECASE)


def now() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)


def one_line(error: BaseException) -> str:
    """An error as one line of text, without passwords."""
    text = without_password(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:300]}"
