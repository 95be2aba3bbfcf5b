"""The stages of all experiments in a folder of runs, finished or not, and which were made from which."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from dparallel.config.base import UserError
from dparallel.config.experiment import MEASUREMENTS
from dparallel.stages.files import read_record
from dparallel.stages.lease import Holder, Watch
from dparallel.stages.manifest import CLAIM, MANIFEST, Manifest, read_manifest
from dparallel.stages.permissions import check_reachable

KEYED = re.compile(r"(.+)-[0-9a-f]{10}")  # names of folders of stages


@dataclass(frozen=True)
class PastStage:
    """A stage's folder.

    Attributes:
        manifest: of a finished stage.
        problem: why the manifest cannot be read.
        inputs: fingerprints of what it is made from.
        holder: the process that works in the folder.
    """

    folder: Path
    manifest: Manifest | None = None
    problem: str | None = None
    inputs: frozenset[str] = frozenset()
    holder: Holder | None = None

    @property
    def name(self) -> str:
        """Name of the stage with that of its student or benchmark, such as `training fast`."""
        keyed = KEYED.fullmatch(self.folder.name)
        return (keyed[1] if keyed else self.folder.name).replace("-", " ", 1)

    @property
    def is_benchmark(self) -> bool:
        """Whether it is a finished benchmark."""
        return self.manifest is not None and self.manifest.stage == "benchmark"

    @cached_property
    def fingerprint(self) -> str | None:
        """What stages that are made from this one record; None if it is unfinished."""
        return None if self.manifest is None else self.manifest.fingerprint

    @cached_property
    def last_work(self) -> datetime:
        """When it was finished, or when a file of it changed last."""
        if self.manifest is not None:
            return self.manifest.finished
        times = [_changed(file) for file in (self.folder, *self.folder.rglob("*"))]
        return datetime.fromtimestamp(max(times), UTC)


@dataclass(frozen=True)
class PastExperiment:
    """An experiment's folder, with its stages in the order of their names."""

    folder: Path
    stages: Sequence[PastStage]

    @property
    def name(self) -> str:
        """Name of the experiment."""
        return self.folder.name

    @property
    def benchmarks(self) -> list[PastStage]:
        """The finished benchmarks, the latest first."""
        found = [stage for stage in self.stages if stage.is_benchmark]
        return sorted(found, key=lambda stage: stage.last_work, reverse=True)

    @property
    def latest(self) -> list[PastStage]:
        """The latest finished stage of each benchmark, in the order of their names."""
        by_name = {stage.name: stage for stage in reversed(self.benchmarks)}
        return [by_name[name] for name in sorted(by_name)]


def past_experiments(runs: Path) -> list[PastExperiment]:
    """All experiments of a folder of runs, in the order of their names.

    A stage's folder that lies directly in it, such as that of a teacher, is an experiment of one stage. A
    link to another folder of them, such as `latest`, is no further experiment.

    Raises:
        UserError: there is no such folder.
    """
    check_reachable(runs)
    if not os.path.isdir(runs):
        raise UserError(f"{runs}: no such folder (looked in {Path.cwd()}): name the folder of runs by --runs")
    found = []
    for folder in sorted(runs.iterdir()):
        if folder.name == MEASUREMENTS or folder.name.startswith(".") or not folder.is_dir():
            continue
        if folder.is_symlink() and folder.resolve().parent == runs.resolve():
            continue
        stages = [folder] if _is_stage(folder) else [stage for stage in _folders(folder) if _is_stage(stage)]
        if stages:
            found.append(PastExperiment(folder, [_stage(stage) for stage in stages]))
    return found


def made_from(stages: Iterable[PastStage], among: Iterable[PastStage]) -> set[Path]:
    """Folders of `stages` and of all that they were made from, directly or not.

    Args:
        among: all stages that they may have been made from.
    """
    by_fingerprint: dict[str, list[PastStage]] = {}
    for stage in among:
        if stage.fingerprint is not None:
            by_fingerprint.setdefault(stage.fingerprint, []).append(stage)
    found, rest = set[Path](), list(stages)
    while rest:
        stage = rest.pop()
        if stage.folder not in found:
            found.add(stage.folder)
            rest += [origin for key in stage.inputs for origin in by_fingerprint.get(key, [])]
    return found


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; links are not followed."""
    if path.is_symlink() or path.is_file():
        return path.lstat().st_size
    return sum(_bytes(file) for file in path.rglob("*"))


def _stage(folder: Path) -> PastStage:
    manifest, problem, inputs = None, None, frozenset[str]()
    try:
        if (folder / MANIFEST).is_file():
            manifest = read_manifest(folder)
            inputs = frozenset(manifest.inputs.values())
    except UserError as error:
        problem = str(error)
    if manifest is None:
        inputs = _claimed_inputs(folder / CLAIM)
    return PastStage(folder, manifest, problem, inputs, _holder(folder))


def _holder(folder: Path) -> Holder | None:
    try:
        return Watch(folder).holder()
    except OSError:  # something else has the name of the lease, or it cannot be read
        return Holder()


def _claimed_inputs(claim: Path) -> frozenset[str]:
    inputs = read_record(claim).get("inputs")
    return frozenset(map(str, inputs.values())) if isinstance(inputs, dict) else frozenset()


def _is_stage(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() or (folder / CLAIM).is_file()


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _changed(file: Path) -> float:
    try:
        return file.lstat().st_mtime
    except OSError:  # removed meanwhile
        return 0.0


def _bytes(file: Path) -> int:
    try:
        return 0 if file.is_dir() and not file.is_symlink() else file.lstat().st_size
    except OSError:  # removed meanwhile
        return 0
