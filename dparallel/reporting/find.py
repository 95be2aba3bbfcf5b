"""Find finished benchmark stages of past runs: by folder, by name of the experiment, or by MLflow run id."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dparallel.config.base import UserError, nearest
from dparallel.config.experiment import MEASUREMENTS
from dparallel.reporting.read import benchmark_name
from dparallel.stages.files import read_record
from dparallel.stages.manifest import CLAIM, MANIFEST, read_manifest
from dparallel.stages.permissions import check_reachable

REPORT = "report.json"
OF_EVAL = (
    "as `dparallel eval` leaves them, without a run that could be compared: measure the models as the "
    "teacher, the students or the baselines of one experiment, which decodes nothing again and tests the "
    "differences"
)


class RunError(UserError):
    """Something given as a run is none, or is not finished; the message names the remedy."""


@dataclass(frozen=True)
class Found:
    """The benchmark stages of a run.

    Attributes:
        given: as the user named the run.
        experiment: name of the experiment.
        label: name of the experiment and the folder that was found.
        stages: name and folder of each benchmark.
        notes: sentences about choices that were made.
    """

    given: str
    experiment: str
    label: str
    stages: list[tuple[str, Path]]
    notes: list[str]


def find_run(given: str, runs: Path) -> Found:
    """The benchmark stages that `given` names.

    Args:
        given: an experiment's folder, a report's folder, a benchmark stage's folder, the name of an
            experiment in `runs`, or the id of an MLflow run.
        runs: folder of experiments.

    Raises:
        RunError: it names no run, or the run is not finished.
    """
    for folder in (Path(os.path.expanduser(given)), runs / given):
        check_reachable(folder)
        if os.path.isdir(folder):
            return _in_folder(given, folder)
    if os.path.isfile(os.path.expanduser(given)):
        raise RunError(f"{given} is a file: give the folder of an experiment, a report or a benchmark stage")
    return _by_id(given, runs)


def _in_folder(given: str, folder: Path) -> Found:
    folder = folder.resolve()
    if (folder / MANIFEST).is_file() or (folder / CLAIM).is_file():
        return _found(given, folder, [(_named(folder), folder)])
    if (folder / REPORT).is_file():
        return _found(given, folder, [(name, stage) for name, stage in _reported(folder)])
    latest: dict[str, list[Path]] = {}
    stages = [stage for stage in sorted(folder.glob("benchmark-*")) if stage.is_dir()]
    for stage in stages:
        if (stage / MANIFEST).is_file():
            latest.setdefault(_named(stage), []).append(stage)
    if not latest:
        if stages:
            raise RunError(f"{given}: {stages[0].name} is not finished: give the experiment's command again")
        if MEASUREMENTS in (folder.name, *(parent.name for parent in folder.parents)):
            raise RunError(f"{given} holds samples and verdicts alone, {OF_EVAL}")
        if (folder / MEASUREMENTS).is_dir():
            raise RunError(
                f"{given} is a folder of runs: give experiments in it; its folder {MEASUREMENTS} holds "
                f"samples and verdicts alone, {OF_EVAL}"
            )
        raise RunError(
            f"{given} is neither an experiment nor a report nor a benchmark stage: it holds no benchmark-* "
            f"folder, no {REPORT} and no {MANIFEST}; give an experiment's folder, or its command again if "
            "it has not come to its benchmark"
        )
    notes = []
    for name, of_name in latest.items():
        of_name.sort(key=lambda stage: read_manifest(stage).finished)
        if len(of_name) > 1:
            notes.append(
                f"{folder.name} holds {len(of_name)} finished benchmarks {name}: the latest, "
                f"{of_name[-1].name}, is taken; give a folder to take another"
            )
    return Found(
        given,
        folder.name,
        folder.name,
        [(name, of_name[-1]) for name, of_name in latest.items()],
        notes,
    )


def _found(given: str, folder: Path, stages: list[tuple[str, Path]]) -> Found:
    experiment = folder.parent.name
    return Found(given, experiment, f"{experiment}/{folder.name}", stages, [])


def _named(folder: Path) -> str:
    """Name of the benchmark of a finished stage; RunError if it is unfinished or another stage."""
    if not (folder / MANIFEST).is_file():
        raise RunError(f"{folder} is not finished (no {MANIFEST}): give the command of its experiment again")
    stage = read_manifest(folder).stage
    if stage != "benchmark":
        raise RunError(f"{folder} is a stage {stage!r}: give a benchmark stage, or the experiment's folder")
    return benchmark_name(folder)


def _reported(folder: Path) -> list[tuple[str, Path]]:
    try:
        sections = json.loads((folder / REPORT).read_text(encoding="utf-8"))["benchmarks"]
        stages = [(section["benchmark"], folder.parent / section["runs"][0]["stage"]) for section in sections]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise RunError(f"{folder / REPORT} is damaged: run the experiment again to write it anew") from error
    for _, stage in stages:
        if not stage.is_dir():
            raise RunError(
                f"{folder / REPORT} is a report on {stage}, which is not there: give the report in its "
                "experiment's folder"
            )
        _named(stage)
    return stages


def _by_id(given: str, runs: Path) -> Found:
    for path in sorted(runs.glob("*/tracking/*.json")):
        record = read_record(path)
        if record.get("run_id") == given:
            return _tracked(given, path.parents[1], record)
    raise RunError(
        f"{given} is neither a folder, nor an experiment in {runs}, nor the id of an MLflow run recorded in "
        f"{runs}/*/tracking: {_similar(given, runs)}give a folder, or name the folder of runs by --runs"
    )


def _similar(given: str, runs: Path) -> str:
    """A "did you mean" hint with the most similar experiment, report or benchmark stage."""
    folders = [folder for folder in sorted(runs.glob("*/")) if folder.name != MEASUREMENTS]
    for part in ("benchmark-*/", "report-*/"):
        folders += sorted(runs.glob(f"*/{part}"))
    names = [folder.relative_to(runs).as_posix() for folder in folders]
    if hint := nearest(given, names):
        return hint
    under = Path(os.path.expanduser(given)).parent  # of a path, such as runs/tiny
    siblings = sorted(under.glob("*/")) if os.path.isdir(under) else []
    return nearest(given, [str(folder) for folder in siblings])


def _tracked(given: str, home: Path, record: dict[str, Any]) -> Found:
    """The report or stage of a record; of an experiment that was moved, in its present folder."""
    files = record.get("files")
    named = [file for file in files if isinstance(file, str)] if isinstance(files, list) else []
    recorded = [Path(file).parent for file in named]
    if isinstance(folder := record.get("folder"), str) and folder:
        recorded.insert(0, Path(folder))
    for folder in (place for path in recorded for place in (path, home / path.name)):
        is_benchmark = (folder / MANIFEST).is_file() and read_manifest(folder).stage == "benchmark"
        if is_benchmark or (folder / REPORT).is_file():
            return _in_folder(given, folder)
    raise RunError(
        f"MLflow run {given} is {record.get('name')!r} of {home.name}, without results of a benchmark: give "
        "the run of the benchmark, or the finished run of the experiment"
    )
