"""Everything that can be wrong with an experiment and seen beforehand, found before any work starts."""

import importlib.util
from pathlib import Path

import torch

from dparallel.config import ConfigError, DistillConfig, TeacherConfig
from dparallel.config_files import load_config
from dparallel.distillation.data import step_shape
from dparallel.distillation.hosts import check_hosts, world_size
from dparallel.distillation.settings import check_builds, check_deepspeed, check_quantization
from dparallel.evaluation.benchmarks import check_disjoint, load_problems
from dparallel.evaluation.text import encode_problems
from dparallel.experiment import Experiment
from dparallel.models.backbone import DiffusionTransformer
from dparallel.models.checkpoints import checkpoint_folder, load_tokenizer, read_config
from dparallel.models.lora import check_targets
from dparallel.plan import check_fits, free_disk, make_plan


def checked_experiment(config: str, overrides: list[str] | None = None) -> Experiment:
    """The experiment of a config file whose inputs are there and fit each other; a teacher by its folder.

    Raises:
        ValueError: (`ConfigError`, `CheckpointError`, `ProblemsError`) naming what is wrong and the remedy.
    """
    settings = load_config(DistillConfig, config, overrides)
    _check_folder(Path(settings.runs))
    _check_launch(settings)
    _check_recipes(settings)
    check_deepspeed(settings.training.deepspeed)
    check_quantization(settings.training)
    check_builds(settings.training.deepspeed)
    _check_teacher(settings)
    check_fits(make_plan(settings, torch.cuda.is_available()), None, free_disk(settings.runs))
    here = str(checkpoint_folder(settings.teacher))  # stages hash files, and the hub's may change
    return Experiment(settings.model_copy(update={"teacher": here}))


def checked_teacher(config: str, overrides: list[str] | None = None) -> TeacherConfig:
    settings = load_config(TeacherConfig, config, overrides)
    _check_folder(Path(settings.out))
    return settings


def chosen_students(experiment: Experiment, student: str | None) -> list[str]:
    """The one student named, or all of the config."""
    known = experiment.config.students
    if student is not None and student not in known:
        raise ConfigError(f"unknown student {student!r}; this config trains {', '.join(known)}")
    return list(known) if student is None else [student]


def _check_folder(folder: Path) -> None:
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{folder} cannot be a folder: {path} is a file")


def _check_launch(settings: DistillConfig) -> None:
    launcher = settings.launch.launcher
    module = {"torchrun": "torch.distributed.run", "deepspeed": "deepspeed"}[launcher]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"launch.launcher={launcher} is not installed (no module {module})")
    check_hosts(settings.launch)
    for recipe in settings.students.values():
        step_shape(settings.training, recipe.views, world_size(settings.launch))


def _check_recipes(settings: DistillConfig) -> None:
    gen_length = settings.trajectories.decoding.gen_length
    for name, recipe in settings.students.items():
        if recipe.block_length is not None and gen_length % recipe.block_length:
            raise ConfigError(
                f"students.{name}.block_length={recipe.block_length} does not divide "
                f"trajectories.decoding.gen_length={gen_length}: choose a divisor of {gen_length}"
            )


def _check_teacher(settings: DistillConfig) -> None:
    """The adapter fits the teacher, which can decode every problem's prompt at the lengths asked for."""
    with torch.device("meta"):  # its shape and special tokens; no weights are read
        teacher = DiffusionTransformer(read_config(settings.teacher))
    check_targets(teacher, settings.training.lora.targets)
    tokenizer = load_tokenizer(settings.teacher)
    benchmark = settings.benchmark
    sweeps = [
        benchmark.sweeps[name].decoding for name in {*benchmark.teacher_sweeps, *benchmark.student_sweeps}
    ]
    longest = max([benchmark.reference, *benchmark.fixed.values(), *sweeps], key=lambda each: each.gen_length)
    recording = settings.trajectories
    trajectories, test, validation = map(
        load_problems, (recording.problems, benchmark.test, benchmark.validation)
    )
    check_disjoint(
        {"trajectories.problems": trajectories, "benchmark.test": test, "benchmark.validation": validation}
    )
    prompts = encode_problems(recording.problems, trajectories, tokenizer, teacher, recording.decoding)
    encode_problems(benchmark.test, test, tokenizer, teacher, longest)
    encode_problems(benchmark.validation, validation, tokenizer, teacher, longest)
    shortest = min(map(len, prompts)) + recording.decoding.gen_length
    max_length = settings.training.max_length
    if max_length is not None and max_length < shortest:
        raise ConfigError(
            f"training.max_length={max_length} leaves nothing to train on: the shortest prompt + response "
            f"has {shortest} tokens"
        )


def check_training_memory(settings: DistillConfig) -> None:
    """The smallest GPU of this machine holds the training; asked where training runs."""
    gpus = range(torch.cuda.device_count())
    memory = min((torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus), default=None)
    check_fits(make_plan(settings, on_gpu=memory is not None), memory, free_disk(settings.runs))
