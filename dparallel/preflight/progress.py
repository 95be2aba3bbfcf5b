"""How much of an experiment is done, judging by the folders of its stages."""

import contextlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dparallel.config.experiment import DistillConfig
from dparallel.models.hub import checkpoint_folder
from dparallel.stages.experiment import Experiment
from dparallel.stages.files import is_there
from dparallel.stages.manifest import MANIFEST, StageError

CHECKPOINTS = "checkpoints"  # sub-folder of a training stage


@dataclass(frozen=True)
class Progress:
    """How much of an experiment is on disk, judging by the folders of its stages.

    Attributes:
        rows: trajectories that are recorded.
        students: names of the students whose training is finished.
        merged: number of merged students.
        checkpoints: size in bytes of checkpoints of students whose training is not finished.
        benchmarks: names of the finished benchmarks.
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
    adapters = sum(_is_merged(experiment, student) for student in config.adapters)
    if not any(experiment.folder.glob("trajectories-*")):
        return Progress(merged=adapters)
    recorded = Path(experiment.trajectories().out_dir)
    if not is_there(recorded / MANIFEST):
        shards = len(list(recorded.glob("part-*.parquet")))
        return Progress(rows=min(rows, shards * config.trajectories.shard_size), merged=adapters)
    trained, merged, checkpoints = set(), adapters, 0
    for student in config.recipes:
        training = Path(experiment.training(student).out_dir)
        if is_there(training / MANIFEST):
            trained.add(student)
            merged += _is_merged(experiment, student)
        else:
            files = (training / CHECKPOINTS).rglob("*")
            checkpoints += sum(file.stat().st_size for file in files if file.is_file())
    measured = _measured(experiment) if merged == len(config.students) else frozenset()
    return Progress(rows, frozenset(trained), merged, checkpoints, measured)


def _is_merged(experiment: Experiment, student: str) -> bool:
    return is_there(Path(experiment.merging(student).out_dir) / MANIFEST)


def _measured(experiment: Experiment) -> frozenset[str]:
    """The finished benchmarks of an experiment whose students are merged."""
    finished = set()
    for name in experiment.config.benchmarks:
        with contextlib.suppress(StageError):  # such as a baseline whose weights are not here
            if is_there(Path(experiment.benchmark(name).out_dir) / MANIFEST):
                finished.add(name)
    return frozenset(finished)
