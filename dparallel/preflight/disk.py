"""The disk space that an experiment still needs, by kind of file."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from dparallel.config.experiment import DistillConfig
from dparallel.distillation.settings import KEPT_CHECKPOINTS
from dparallel.preflight.progress import Progress


@dataclass(frozen=True)
class Sizes:
    """Bytes per trajectory, and per checkpoint, adapter and merged model of a student."""

    trajectory: int
    checkpoint: int
    adapter: int
    merged: int


def disk_bytes(config: DistillConfig, sizes: Sizes, rows: int, done: Progress) -> dict[str, int]:
    """Bytes still to be written, by kind, assuming no compression.

    While a checkpoint is written, the previous ones still exist. MLflow stores copies of adapters and merged
    models if its store is on the same disk.
    """
    to_train, to_merge = len(config.recipes) - done.trained, len(config.students) - done.merged
    checkpoints = sizes.checkpoint * (KEPT_CHECKPOINTS * to_train + (to_train > 0))
    needed = {
        "trajectories": (rows - done.rows) * sizes.trajectory,
        "checkpoints": max(0, checkpoints - done.checkpoints),
        "adapters": to_train * sizes.adapter,
        "merged models": to_merge * sizes.merged,
    }
    if _mlflow_copies_beside(config.runs):
        needed["copies in MLflow"] = needed["adapters"] + needed["merged models"]
    return needed


def _mlflow_copies_beside(runs: str) -> bool:
    """Whether MLflow's store is local and on the disk of `runs`."""
    store = os.environ.get("MLFLOW_TRACKING_URI", "")
    if "://" in store and not store.startswith(("sqlite:", "file:")):
        return False
    return _existing("mlruns").stat().st_dev == _existing(runs).stat().st_dev


def free_disk(folder: str | Path) -> int:
    """Free bytes on the disk of `folder`, which need not exist yet."""
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: str | Path) -> Path:
    path = Path(folder).absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())
