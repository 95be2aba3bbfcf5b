"""What can be removed from a folder of runs: what no kept result refers to, and what killed runs left."""

import contextlib
import os
import posixpath
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dparallel.config.base import UserError, nearest
from dparallel.config.experiment import MEASUREMENTS
from dparallel.config.files import read_settings
from dparallel.reporting.find import REPORT, RunError
from dparallel.reporting.past import PastExperiment, PastStage, made_from, size_of
from dparallel.stages.files import PARTIAL, SAVING, read_record, sweep
from dparallel.stages.lease import held
from dparallel.stages.snapshot import CONFIGS

REMOVING = ".removing-"  # how names of folders that are being removed begin
TRACKING = "tracking"  # folder of records for the tracking server, in the experiment's folder
CHECKPOINTS = "checkpoints"
# A benchmark goes last: after an interruption it still leads to what was made for it.
ORDER = ("report", "measurements", "rest", "teacher", "trajectories", "training", "merging", "benchmark")


@dataclass(frozen=True)
class Removal:
    """Something to remove.

    Attributes:
        kind: one of `ORDER`, in which kinds are removed.
        paths: files and folders.
        folder: where they lie; of a stage, its folder.
        why: the reason, as the end of a sentence.
    """

    kind: str
    paths: Sequence[Path]
    folder: Path
    why: str

    @property
    def bytes(self) -> int:
        """What is freed."""
        return sum(map(size_of, self.paths))

    @property
    def is_stage(self) -> bool:
        """Whether it is a whole stage, which is removed while its lease is held."""
        return list(self.paths) == [self.folder]


def results_to_give_up(experiments: Iterable[PastExperiment], keep: int) -> set[Path]:
    """Folders of the finished benchmarks but for the `keep` latest of each benchmark of an experiment."""
    older = set()
    for experiment in experiments:
        seen: dict[str, int] = {}
        for stage in experiment.benchmarks:
            seen[stage.name] = seen.get(stage.name, 0) + 1
            if seen[stage.name] > keep:
                older.add(stage.folder)
    return older


def named_stages(given: str, runs: Path, experiments: Sequence[PastExperiment]) -> set[Path]:
    """Folders of the stages that `given` names: an experiment, a report or a stage.

    Raises:
        RunError: it names nothing in `runs`.
    """
    for place in (runs / given, Path(os.path.expanduser(given))):
        folder = Path(os.path.realpath(place))
        for experiment in experiments:
            folders = {stage.folder for stage in experiment.stages}
            if experiment.folder.resolve() == folder:
                return folders
            for stage in folders:
                if stage.resolve() == folder:
                    return {stage}
            if folder.parent == experiment.folder.resolve() and (folder / REPORT).is_file():
                return {experiment.folder / name for name in _stages_of(folder)} & folders
    raise RunError(
        f"{given} is no experiment, report or stage in {runs}: "
        f"{nearest(given, [experiment.name for experiment in experiments])}`dparallel runs` lists the "
        "experiments; name another folder of runs by --runs"
    )


def removals(
    runs: Path,
    experiments: Sequence[PastExperiment],
    given_up: Mapping[Path, str],
    checkpoints: bool = False,
) -> tuple[list[Removal], list[str]]:
    """What can be removed if the stages `given_up` are not needed any more.

    Without these, only what no result was made from goes, if a result of the same experiment was finished
    later; and what killed processes left. Stages that are being worked on are kept, with all that they are
    made from; so are unfinished ones that no result came after.

    Args:
        runs: the folder of runs.
        experiments: all in that folder.
        given_up: folders of stages, such as benchmarks whose results are not needed, and why.
        checkpoints: also remove the checkpoints of finished trainings, which serve to repair them.

    Returns:
        The removals in their order, and sentences about what is kept.
    """
    stages = [stage for experiment in experiments for stage in experiment.stages]
    kept = _kept(experiments, stages, given_up)
    gone = [stage for stage in stages if stage.folder not in kept]
    found = [_removal(stage, given_up) for stage in gone]
    for experiment in experiments:
        found += _around(experiment, {stage.folder for stage in gone}, checkpoints)
    measurements, notes = _measurements(runs / MEASUREMENTS, stages, gone)
    found += measurements
    for stage in stages:
        if stage.holder is not None and stage.folder in given_up:
            notes.append(f"{stage.folder} is in use by {stage.holder}, and is kept.")
    for folder in (runs, *(experiment.folder for experiment in experiments)):
        if left := sorted(folder.glob(f"{REMOVING}*")):
            found.append(Removal("rest", left, folder, "an earlier removal was interrupted"))
    return sorted(found, key=lambda removal: (ORDER.index(removal.kind), removal.folder)), notes


def remove(removal: Removal) -> None:
    """Remove it; after an interruption, what is left is found again.

    Raises:
        LeaseHeldError: another run works in the stage's folder, which is kept.
        OSError: the files cannot be removed.
    """
    if removal.is_stage:
        aside = removal.folder.with_name(f"{REMOVING}{removal.folder.name}")
        with held(removal.folder.resolve()):  # which also ends where the folder is a link
            removal.folder.rename(aside)
        _delete(aside)
        return
    for path in removal.paths:
        if path.name.endswith(PARTIAL):
            sweep(path.parent)  # those that are being written are locked, and kept
        elif path.name.startswith(SAVING):
            with held(path.parent):  # which removes them
                pass
        else:
            _delete(path)


def stores_that_keep(experiments: Iterable[PastExperiment], found: Iterable[Removal]) -> list[str]:
    """A sentence for each experiment with removals whose latest config names a store, which is left alone."""
    notes, folders = [], [removal.folder for removal in found]
    for experiment in experiments:
        store = _store_of(experiment.folder)
        if store is not None and any(experiment.folder in (folder, folder.parent) for folder in folders):
            notes.append(
                f"{experiment.name}: {store} keeps its copies, from which a later run takes what it needs; "
                "only the files of this machine are removed."
            )
    return notes


def what_stays(experiments: Iterable[PastExperiment], found: Iterable[Removal]) -> str:
    """A sentence with the number of stages of each experiment that no removal is about."""
    gone = {removal.folder for removal in found if removal.is_stage}
    counts = {
        experiment.name: sum(stage.folder not in gone for stage in experiment.stages)
        for experiment in experiments
    }
    stages = [f"{name} ({count} stage{'s' if count > 1 else ''})" for name, count in counts.items() if count]
    return (
        f"Kept: {', '.join(stages) or 'no stage'}; samples of `dparallel eval`, files elsewhere (a store, "
        "configs, teachers), and MLflow's runs and models are not touched."
    )


def remove_empty(experiments: Iterable[PastExperiment]) -> None:
    """Remove the folders of experiments of which nothing is left, or the links to them."""
    for experiment in experiments:
        folder = experiment.folder
        if folder.is_dir() and not any(folder.iterdir()):
            drop = folder.unlink if folder.is_symlink() else folder.rmdir
            with contextlib.suppress(OSError):  # a run may have begun in it meanwhile
                drop()


def _kept(
    experiments: Iterable[PastExperiment], stages: Sequence[PastStage], given_up: Collection[Path]
) -> set[Path]:
    results = [stage for stage in stages if stage.is_benchmark]
    used = made_from(results, stages)
    roots = [stage for stage in results if stage.folder not in given_up]
    for experiment in experiments:
        in_use = any(stage.holder is not None for stage in experiment.stages)
        by_itself = [stage.folder for stage in experiment.stages] == [experiment.folder]
        latest = max((stage.last_work for stage in experiment.benchmarks), default=None)
        for stage in experiment.stages:
            superseded = latest is not None and stage.last_work < latest and not in_use and not by_itself
            needed = stage.folder not in given_up and (
                by_itself or (stage.folder not in used and not superseded)
            )
            if needed or stage.holder is not None:
                roots.append(stage)
    return made_from(roots, stages)


def _removal(stage: PastStage, given_up: Mapping[Path, str]) -> Removal:
    why = given_up.get(stage.folder, "nothing that is kept was made from it")
    if stage.manifest is None and stage.folder not in given_up:
        why = "unfinished, and a result was finished later"
    kind = stage.name.partition(" ")[0]
    return Removal(kind if kind in ORDER else "rest", [stage.folder], stage.folder, why)


def _around(experiment: PastExperiment, gone: set[Path], checkpoints: bool) -> list[Removal]:
    """What lies beside the stages of an experiment, and temporary files."""
    folder, found = experiment.folder, list[Removal]()
    stages = [stage for stage in experiment.stages if stage.folder not in gone]
    for report in sorted(folder.glob(f"report-*/{REPORT}")):
        if {folder / name for name in _stages_of(report.parent)} & gone:
            found.append(Removal("report", [report.parent], folder, "it reports on what is removed"))
    removed = (path for path in gone if path.parent == folder)
    plans = [plan for path in removed if (plan := path.with_name(f"{path.name}.plan.json")).is_file()]
    if plans:
        found.append(Removal("rest", sorted(plans), folder, "they belong to what is removed"))
    for stage in stages:
        if checkpoints and stage.manifest is not None and (stage.folder / CHECKPOINTS).is_dir():
            path = stage.folder / CHECKPOINTS
            found.append(Removal("rest", [path], stage.folder, "its training is finished"))
        saving = [] if stage.holder is not None else sorted(stage.folder.glob(f"{SAVING}*"))
        partial = sorted(stage.folder.rglob(f".*{PARTIAL}"))
        if saving or partial:
            found.append(Removal("rest", [*saving, *partial], stage.folder, "a killed run left it"))
    if not stages and folder not in gone:
        beside = [path for name in (CONFIGS, TRACKING) if (path := folder / name).is_dir()]
        pending = [
            file for file in folder.glob(f"{TRACKING}/*.json") if not read_record(file).get("uploaded")
        ]
        why = "all of the experiment is removed"
        if pending:
            beside = [path for path in beside if path.name != TRACKING]
        if beside:
            found.append(Removal("rest", beside, folder, why))
    return found


def _measurements(
    store: Path, stages: Sequence[PastStage], gone: Sequence[PastStage]
) -> tuple[list[Removal], list[str]]:
    """Samples and verdicts that only removed benchmarks were made from."""
    removed = {stage.folder for stage in gone}
    kept = [stage for stage in stages if stage.folder not in removed]
    names = {name for stage in gone for name in _measured(stage) or ()}
    names -= {posixpath.normpath(name) for stage in kept for name in _measured(stage) or ()}
    files = _files_in(store, names)
    waiting = [stage.folder for stage in kept if _measured(stage) is None]
    if not files:
        return [], []
    if waiting:
        return [], [
            f"{len(files)} files of measurements are kept, because {waiting[0]}, which is unfinished or "
            "damaged, may use them: finish it, or name it as well."
        ]
    why = f"{len(files)} files of measurements that only removed benchmarks were made from"
    return [Removal("measurements", files, store, why)], []


def _measured(stage: PastStage) -> Collection[str] | None:
    """Names in the store of what a stage was made from, as recorded; None if they are not known."""
    if stage.manifest is None or not stage.is_benchmark:
        return None if stage.name.startswith("benchmark") else ()
    recorded = stage.manifest.details.get("measurements")
    return recorded if isinstance(recorded, dict) else None


def _files_in(store: Path, names: set[str]) -> list[Path]:
    """The files of these names in a store.

    Manifests come from other machines too, so their names only select among the files that lie in the store,
    of which linked folders are no part; a name that leads elsewhere selects nothing.
    """
    if not names:
        return []
    inside = {path.relative_to(store).as_posix(): path for path in store.rglob("*")}
    return [inside[name] for name in sorted(names & inside.keys()) if inside[name].is_file()]


def _stages_of(report: Path) -> list[str]:
    """Names of the stages that a report is about; empty if it is damaged."""
    try:
        sections = read_record(report / REPORT)["benchmarks"]
        names = [run["stage"] for section in sections for run in section["runs"]]
    except (KeyError, TypeError):
        return []
    return [name for name in names if isinstance(name, str)]


def _store_of(experiment: Path) -> str | None:
    """The store that the experiment's latest config names."""
    files = [file for file in experiment.glob(f"{CONFIGS}/*.yaml") if file.is_file()]
    if not files:
        return None
    try:
        store = read_settings(max(files, key=lambda file: file.stat().st_mtime)).get("store")
    except UserError:  # damaged
        return None
    return store if isinstance(store, str) else None


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
