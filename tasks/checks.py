"""Checks of the flows before any work starts: inputs, disk space, and GPUs of this machine."""

import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from pydantic import BaseModel

from dparallel.config.base import ConfigError, UserError, nearest
from dparallel.config.experiment import DistillConfig
from dparallel.config.files import load_config, make_config, parse_yaml, read_settings
from dparallel.config.partial import overrides_of, partial_of
from dparallel.config.roots import check_inside_roots
from dparallel.config.teacher import TeacherConfig
from dparallel.models.checkpoints import read_config
from dparallel.models.hub import checkpoint_folder
from dparallel.models.placement import empty_model
from dparallel.preflight.baselines import baseline_decodings
from dparallel.preflight.checks import STAGES, check_experiment, check_folder
from dparallel.preflight.disk import free_disk
from dparallel.preflight.memory import check_decoding, decoding_memory, students_memory, training_shape
from dparallel.preflight.plan import check_disk, disk_needed
from dparallel.preflight.progress import progress
from dparallel.preflight.prompts import PromptLengths
from dparallel.preflight.remedy import check_training
from dparallel.stages.experiment import Experiment
from dparallel.stages.manifest import StageError, fingerprint
from dparallel.stages.snapshot import snapshot_of, take_snapshot
from dparallel.stages.storage.inputs import localized
from tasks.launch import fit_to_gpus

Given = str | dict[str, Any]  # a config file, or the snapshot of a run in progress as JSON values
if TYPE_CHECKING:
    Settings: TypeAlias = BaseModel
    TeacherSettings: TypeAlias = BaseModel
else:  # the form in Prefect's UI, whose values the server checks
    Settings, TeacherSettings = partial_of(DistillConfig), partial_of(TeacherConfig)


def all_overrides(settings: BaseModel | Mapping[str, Any] | None, overrides: list[str] | None) -> list[str]:
    """Settings given as values, and then those given as text, as overrides of a config."""
    return [*overrides_of(settings), *(overrides or [])]


def stated_name(config: object, overrides: Sequence[str]) -> str | None:
    """The experiment's name that overrides, a snapshot or a config file state; None if none can be read."""
    try:
        for override in reversed(overrides):
            if override.startswith("name="):
                named = parse_yaml(override.removeprefix("name="), override)
                return str(named) if named else None
        stated = config.get("settings") if isinstance(config, Mapping) else read_settings(str(config))
    except UserError:  # the run says what is wrong
        return None
    named = stated.get("name") if isinstance(stated, Mapping) else None
    return str(named) if named else None


def checked_experiment(
    config: Given,
    overrides: list[str] | None = None,
    stages: Collection[str] = STAGES,
    here: Collection[str] = (),
) -> Experiment:
    """Load an experiment, check its inputs, and keep its settings as they are now.

    Args:
        stages: the stages to run; only their inputs are read.
        here: the stages that run on this machine's GPUs (if it has any), whose memory is checked.

    Raises:
        UserError: names the mistake and the remedy.
    """
    snapshot = take_snapshot(config, overrides)
    check_inside_roots(snapshot.experiment().model_dump(mode="json"))
    settings = localized(snapshot.experiment())
    if missing := baseline_decodings(settings):
        complete = make_config(DistillConfig, snapshot.settings, snapshot.config, missing)
        snapshot = snapshot_of(complete, snapshot.config, snapshot.overrides)
        settings = localized(snapshot.experiment())
    gpus = torch.cuda.device_count()
    length_matters = gpus > 0 and "training" in here
    lengths = check_experiment(settings, {*stages, "trajectories"} if length_matters else stages)
    if lengths.trajectories:
        _check_disk(settings, lengths)
    if gpus:
        _check_gpus(settings, lengths, here, gpus)
    folder_of = cache(checkpoint_folder)  # once: the hub's snapshot may change
    fingerprint(folder_of(settings.teacher), hashed=bool(stages))  # refuses damaged files
    if "benchmark" in stages:
        for model in settings.baseline_models():
            fingerprint(folder_of(model))
    snapshot.keep()
    return Experiment(settings, folder_of, snapshot)


def _check_disk(settings: DistillConfig, lengths: PromptLengths) -> None:
    """Check that everything still to be written fits on the disk."""
    prompts = lengths.trajectories
    shape = training_shape(settings, max(prompts), torch.cuda.is_available())
    needed = disk_needed(settings, prompts, shape, progress(settings, len(prompts)))
    check_disk(settings.runs, needed, free_disk(settings.runs))


def _check_gpus(settings: DistillConfig, lengths: PromptLengths, here: Collection[str], gpus: int) -> None:
    """Check that the stages fit into the smallest GPU of this machine."""
    memory = min(torch.cuda.get_device_properties(gpu).total_memory for gpu in range(gpus))
    if {"trajectories", "benchmark"} & set(here):
        check_decoding(decoding_memory(settings, lengths), memory)
    if "training" in here and progress(settings, len(lengths.trajectories)).trained < len(settings.recipes):
        views = max(recipe.views for recipe in settings.recipes.values())
        launch = fit_to_gpus(settings.launch, settings.training, views, gpus)
        launched = settings.model_copy(update={"launch": launch})
        shape = training_shape(launched, max(lengths.trajectories), on_gpu=True)
        teacher = empty_model(read_config(settings.teacher))
        needed = students_memory(teacher, launched, settings.training, shape)
        check_training(launched, shape, needed, memory)


def checked_teacher(config: str, overrides: list[str] | None = None) -> TeacherConfig:
    """Load the settings of a tiny teacher and check its folder."""
    settings = load_config(TeacherConfig, config, overrides)
    check_inside_roots(settings.model_dump(mode="json"))
    check_folder(Path(settings.out))
    return settings


def chosen(kind: str, known: Iterable[str], name: str | None) -> list[str]:
    """The student or benchmark (`kind`) named `name`; all `known` ones if it is None."""
    names = list(known)
    if name is not None and name not in names:
        hint = nearest(name, names)
        raise ConfigError(f"unknown {kind} {name!r}; {hint}this config has {', '.join(names)}")
    return names if name is None else [name]


def ready_students(
    stage: str,
    config: Given,
    overrides: list[str] | None,
    student: str | None = None,
    here: Collection[str] = (),
) -> tuple[Experiment, list[str]]:
    """Load and check an experiment for one stage, whose inputs must be finished.

    Args:
        student: the student that the stage is run for; by default all.
        here: as for `checked_experiment`.

    Returns:
        The experiment and the names of the students.
    """
    experiment = checked_experiment(config, overrides, [stage], here)
    settings = experiment.config
    students = chosen("student", settings.recipes if stage == "training" else settings.students, student)
    check_ready(stage, experiment, students)
    return experiment, students


def check_ready(stage: str, experiment: Experiment, students: list[str]) -> None:
    """Check that the stages that `stage` depends on are finished.

    Raises:
        StageError: names the command that runs the first unfinished stage.
    """
    trained = [student for student in students if student in experiment.config.recipes]
    earlier: list[tuple[str, str | None]] = [("trajectories", None)] if trained else []
    if stage in ("merging", "benchmark"):
        earlier += [("training", student) for student in trained]
    if stage == "benchmark":
        earlier += [("merging", student) for student in students]
    plans = {"training": experiment.training, "merging": experiment.merging}
    for name, student in earlier:
        plan = experiment.trajectories() if student is None else plans[name](student)
        if experiment.is_finished(plan.out_dir):
            continue
        command = ["python", "-m", f"flows.{name}", "--config", experiment.snapshot.config]
        command += ["--set", *experiment.snapshot.overrides] if experiment.snapshot.overrides else []
        command += [] if student is None else ["--student", student]
        message = f"{stage} needs finished {name}"
        message += "" if student is None else f" of student {student!r}"
        message += f", and {plan.out_dir} is not finished: run {shlex.join(command)} first"
        if stage == "merging" and name == "training" and len(students) > 1:
            message += ", or merge only a student that is trained, with --student NAME"
        raise StageError(message)
