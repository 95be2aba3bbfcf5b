"""A training's checkpoints on disk: when one is whole, which one a run goes on from, and which are removed.

A checkpoint is written into a folder of another name, described by `checkpoint.json` with the sizes and
hashes of its files, and only then named `step-00000100`. Nothing here knows DeepSpeed.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from dparallel.distillation.settings import KEPT_CHECKPOINTS, offloads_optimizer
from dparallel.stages.files import write_atomically
from dparallel.stages.manifest import FileRecord, StageError, file_digest

log = logging.getLogger(__name__)

DESCRIPTION = "checkpoint.json"
UNFINISHED = "unfinished"  # what a killed run leaves; no run reads it
DIVIDING = ("sub_group_size", "round_robin_gradients", "zero_hpz_partition_size")  # the optimizer's state
SET_BY = {"processes": "launch.processes", "precision": "training.precision"}


class Checkpoint(BaseModel):
    """What `checkpoint.json` says.

    `layout` is how the optimizer's state is divided into files and tensors: only a launch that divides it
    the same way can read them.
    """

    train_step: int
    layout: dict[str, Any]
    files: dict[str, FileRecord]

    @property
    def tag(self) -> str:
        return step_tag(self.train_step)


def step_tag(train_step: int) -> str:
    return f"step-{train_step:08d}"


def layout(settings: dict[str, Any], processes: int) -> dict[str, Any]:
    """What of a launch and of its DeepSpeed settings decides how a checkpoint is divided."""
    zero = settings["zero_optimization"]
    made = {
        "processes": processes,
        "precision": "bf16" if settings["bf16"]["enabled"] else "fp32",
        "stage": zero["stage"],
    }
    if offloads_optimizer(settings):
        made["offload_optimizer"] = zero["offload_optimizer"]["device"]
    return made | {name: zero[name] for name in DIVIDING if name in zero}


def keep(folder: Path, train_step: int, layout: dict[str, Any]) -> None:
    """Give the unfinished checkpoint its name once it is safe on the disk; keep the last two."""
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
    made = Checkpoint(train_step=train_step, layout=layout, files=records)
    write_atomically(unfinished / DESCRIPTION, made.model_dump_json(indent=1))
    if (folder / made.tag).exists():  # damaged, else this run had gone on from it
        shutil.rmtree(folder / made.tag)
    unfinished.rename(folder / made.tag)
    earlier = [old for old in _newest_first(folder) if old.name <= made.tag]
    later = [old for old in _newest_first(folder) if old.name > made.tag]
    for old in [*earlier[KEPT_CHECKPOINTS:], *later]:
        shutil.rmtree(old)


def newest_whole(folder: Path, layout: dict[str, Any]) -> Checkpoint | None:
    """The newest checkpoint whose files are what was written; None where none was finished.

    Damaged ones are left where they are, and the log names them.

    Raises:
        StageError: all are damaged, or this launch divides the optimizer's state in another way.
    """
    damaged: list[str] = []
    for tag in _newest_first(folder):
        found = _read_whole(tag)
        if isinstance(found, Checkpoint):
            _check_layout(folder, found, layout)
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
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def _read_whole(folder: Path) -> Checkpoint | str:
    """A checkpoint, every file of it compared; or why it cannot be used."""
    try:
        found = Checkpoint.model_validate_json((folder / DESCRIPTION).read_bytes())
    except FileNotFoundError:
        return f"{folder} has no {DESCRIPTION}"
    except ValidationError:
        return f"{folder / DESCRIPTION} is damaged"
    if found.tag != folder.name:
        return f"{folder} holds the checkpoint of train step {found.train_step}"
    for name, record in found.files.items():
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != record.bytes or file_digest(file) != record.sha256:
            return f"{file} is damaged"
    return found


def _check_layout(folder: Path, found: Checkpoint, layout: dict[str, Any]) -> None:
    for name in sorted({*found.layout, *layout}):
        there, here = found.layout.get(name), layout.get(name)
        if there != here:
            setting = SET_BY.get(name, f"training.deepspeed.zero_optimization.{name}")
            raise StageError(
                f"{folder} was written with {name}={there}, this launch has {here} and cannot read it: go on "
                f"with {setting} as it was ({there}), or delete {folder} to train from the start"
            )
