"""Training checkpoints on disk: validate them, choose the one to resume from, and remove old ones.

A checkpoint is written to a temporary folder, described by `checkpoint.json` with the sizes and hashes of its
files, and then renamed to `step-00000100`. Any number of processes can resume from it, at any ZeRO stage and
with any offloading. This module does not depend on DeepSpeed.
"""

import logging
import os
import shutil
from pathlib import Path

from pydantic import BaseModel, ValidationError

from dparallel.distillation.settings import KEPT_CHECKPOINTS
from dparallel.stages.files import write_atomically
from dparallel.stages.manifest import FileRecord, StageError, file_digest

log = logging.getLogger(__name__)

DESCRIPTION = "checkpoint.json"
STATE = "state.safetensors"
UNFINISHED = "unfinished"  # folder of a checkpoint being written; never read


class Checkpoint(BaseModel):
    """Content of `checkpoint.json`; `precision` is the dtype of the launch that wrote it, as text."""

    train_step: int
    precision: str | None = None
    files: dict[str, FileRecord]

    @property
    def tag(self) -> str:
        return step_tag(self.train_step)

    @property
    def state_file(self) -> Path:
        """The state of adapter and optimizer, relative to the checkpoints' folder."""
        return Path(self.tag, STATE)


def step_tag(train_step: int) -> str:
    """Folder name of the checkpoint of a train step."""
    return f"step-{train_step:08d}"


def begin(folder: Path) -> Path:
    """The file to write the state of a new checkpoint to, in a new temporary folder."""
    remove_unfinished(folder)
    (folder / UNFINISHED).mkdir(parents=True)
    return folder / UNFINISHED / STATE


def keep(folder: Path, train_step: int, precision: str) -> None:
    """Flush the unfinished checkpoint to disk and rename it; keep the last two."""
    unfinished = folder / UNFINISHED
    files = sorted(file for file in unfinished.rglob("*") if file.is_file())
    for file in files:
        with file.open("rb") as written:
            os.fsync(written.fileno())
    records = {
        file.relative_to(unfinished).as_posix(): FileRecord(
            bytes=file.stat().st_size, sha256=file_digest(file)
        )
        for file in files
    }
    made = Checkpoint(train_step=train_step, precision=precision, files=records)
    write_atomically(unfinished / DESCRIPTION, made.model_dump_json(indent=1))
    if (folder / made.tag).exists():  # it is damaged, otherwise this run had resumed from it
        shutil.rmtree(folder / made.tag)
    unfinished.rename(folder / made.tag)
    earlier = [old for old in _newest_first(folder) if old.name <= made.tag]
    later = [old for old in _newest_first(folder) if old.name > made.tag]
    for old in [*earlier[KEPT_CHECKPOINTS:], *later]:
        shutil.rmtree(old)


def newest_whole(folder: Path) -> Checkpoint | None:
    """The newest intact checkpoint; None if none was ever finished.

    Damaged checkpoints are kept and logged.

    Raises:
        StageError: all checkpoints are damaged, or were written by an earlier version.
    """
    damaged: list[str] = []
    for tag in _newest_first(folder):
        found = _read_whole(tag)
        if isinstance(found, Checkpoint):
            if STATE not in found.files:
                raise StageError(
                    f"{tag} was written by an earlier version and holds no {STATE}: finish this training "
                    f"with that version, or delete {folder} to train from the start"
                )
            for why in damaged:
                log.warning("%s; going on from train step %d", why, found.train_step)
            return found
        damaged.append(found)
    if damaged:
        raise StageError(
            f"{folder} holds no whole checkpoint ({'; '.join(damaged)}): delete it to train from the start"
        )
    return None


def remove_unfinished(folder: Path) -> None:
    """Delete the checkpoint that an interrupted run was writing."""
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def _newest_first(folder: Path) -> list[Path]:
    return sorted((tag for tag in folder.glob("step-*") if tag.is_dir()), reverse=True)


def _read_whole(folder: Path) -> Checkpoint | str:
    """Read a checkpoint and compare all its files; returns a reason if it cannot be used."""
    try:
        found = Checkpoint.model_validate_json((folder / DESCRIPTION).read_bytes())
    except FileNotFoundError:
        return f"{folder} has no {DESCRIPTION}"
    except OSError as error:
        return f"{folder / DESCRIPTION} cannot be read ({error.strerror})"
    except ValidationError:
        return f"{folder / DESCRIPTION} is damaged"
    if found.tag != folder.name:
        return f"{folder} holds the checkpoint of train step {found.train_step}"
    for name, record in found.files.items():
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        try:
            whole = file.stat().st_size == record.bytes and file_digest(file) == record.sha256
        except StageError as error:  # it cannot be read
            return str(error)
        if not whole:
            return f"{file} is damaged"
    return found
