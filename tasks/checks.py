"""What the flows check before any work starts: an experiment's inputs, its disk and this machine's GPUs."""

from collections.abc import Collection
from pathlib import Path

import torch

from dparallel.config.base import ConfigError
from dparallel.config.experiment import DistillConfig, TeacherConfig
from dparallel.config.files import load_config
from dparallel.models.hub import checkpoint_folder
from dparallel.preflight.checks import check_folder, check_inputs
from dparallel.preflight.disk import free_disk
from dparallel.preflight.plan import Prompts, check_decoding, check_disk, check_training, make_plan
from dparallel.stages.experiment import Experiment
from tasks.launch import fit_to_gpus


def checked_experiment(
    config: str, overrides: list[str] | None = None, here: Collection[str] = ()
) -> Experiment:
    """The experiment of a config file whose inputs are there and fit each other; a teacher by its folder.

    Args:
        here: stages that run on this machine's GPUs, where there are any, and must fit them.

    Raises:
        ValueError: (`ConfigError`, `CheckpointError`, `ProblemsError`) naming what is wrong and the remedy.
    """
    settings = load_config(DistillConfig, config, overrides)
    prompts = check_inputs(settings)
    check_disk(make_plan(settings, prompts, torch.cuda.is_available()), free_disk(settings.runs))
    _check_gpus(settings, prompts, here)
    folder = str(checkpoint_folder(settings.teacher))  # stages hash files, and the hub's may change
    return Experiment(settings.model_copy(update={"teacher": folder}))


def _check_gpus(settings: DistillConfig, prompts: Prompts, here: Collection[str]) -> None:
    """The smallest GPU of this machine holds each of the stages."""
    gpus = range(torch.cuda.device_count())
    if not gpus or not here:
        return
    memory = min(torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus)
    views = max(recipe.views for recipe in settings.students.values())
    launch = fit_to_gpus(settings.launch, settings.training, views, len(gpus))
    plan = make_plan(settings.model_copy(update={"launch": launch}), prompts, on_gpu=True)
    if {"trajectories", "benchmark"} & set(here):
        check_decoding(plan, memory)
    if "training" in here:
        check_training(plan, memory)


def checked_teacher(config: str, overrides: list[str] | None = None) -> TeacherConfig:
    settings = load_config(TeacherConfig, config, overrides)
    check_folder(Path(settings.out))
    return settings


def chosen_students(experiment: Experiment, student: str | None) -> list[str]:
    """The one student named, or all of the config."""
    known = experiment.config.students
    if student is not None and student not in known:
        raise ConfigError(f"unknown student {student!r}; this config trains {', '.join(known)}")
    return list(known) if student is None else [student]
