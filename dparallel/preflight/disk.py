"""What is done of an experiment, and the disk space that it still needs, by kind of file."""

import contextlib
import os
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dparallel.config.experiment import DistillConfig
from dparallel.distillation.settings import KEPT_CHECKPOINTS
from dparallel.models.hub import checkpoint_folder
from dparallel.stages.experiment import Experiment
from dparallel.stages.files import is_there
from dparallel.stages.manifest import MANIFEST, StageError

CHECKPOINTS = "checkpoints"  # sub-folder of a training stage


@dataclass(frozen=True)
class Sizes:
    """Bytes per trajectory, and per checkpoint, adapter and merged model of a student."""

    trajectory: int
    checkpoint: int
    adapter: int
    merged: int


@dataclass(frozen=True)
class Progress:
    """How much of an experiment is on disk, judging by the folders of its stages.

    Attributes:
        rows: trajectories that are recorded.
        students: those whose training is finished.
        merged: number of merged students.
        checkpoints: size in bytes of checkpoints of students whose training is not finished.
        benchmarks: those that are finished.
    """

    rows: int = 0
    students: frozenset[str] = frozenset()
    merged: int = 0
    checkpoints: int = 0
    benchmarks: frozenset[str] = frozenset()

    @property
    def trained(self) -> int:
        """Number of students whose training is finished."""
        return len(self.students)


def progress(config: DistillConfig, rows: int) -> Progress:
    """Determine what is done of an experiment of `rows` trajectories; hashes only existing stage folders.

    Raises:
        StageError: a finished stage was damaged.
    """
    experiment = Experiment(config, partial(checkpoint_folder, with_weights=False))
    if not any(experiment.folder.glob("trajectories-*")):
        return Progress()
    recorded = Path(experiment.trajectories().out_dir)
    if not is_there(recorded / MANIFEST):
        shards = len(list(recorded.glob("part-*.parquet")))
        return Progress(rows=min(rows, shards * config.trajectories.shard_size))
    trained, merged, checkpoints = set(), 0, 0
    for student in config.students:
        training = Path(experiment.training(student).out_dir)
        if is_there(training / MANIFEST):
            trained.add(student)
            merged += is_there(Path(experiment.merging(student).out_dir) / MANIFEST)
        else:
            files = (training / CHECKPOINTS).rglob("*")
            checkpoints += sum(file.stat().st_size for file in files if file.is_file())
    measured = _measured(experiment) if merged == len(config.students) else frozenset()
    return Progress(rows, frozenset(trained), merged, checkpoints, measured)


def _measured(experiment: Experiment) -> frozenset[str]:
    """The finished benchmarks of an experiment whose students are merged."""
    finished = set()
    for name in experiment.config.benchmarks:
        with contextlib.suppress(StageError):  # such as a baseline whose weights are not here
            if is_there(Path(experiment.benchmark(name).out_dir) / MANIFEST):
                finished.add(name)
    return frozenset(finished)


def disk_bytes(config: DistillConfig, sizes: Sizes, rows: int, done: Progress) -> dict[str, int]:
    """Bytes still to be written, by kind, assuming no compression.

    While a checkpoint is written, the previous ones still exist. MLflow stores copies of adapters and merged
    models if its store is on the same disk.
    """
    to_train, to_merge = len(config.students) - done.trained, len(config.students) - done.merged
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
