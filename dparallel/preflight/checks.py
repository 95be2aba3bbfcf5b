"""Everything that can be wrong with an experiment and seen beforehand, found before any work starts."""

import importlib.util
from pathlib import Path

from dparallel.config.base import ConfigError
from dparallel.config.experiment import DistillConfig
from dparallel.decoding.generate import check_prompts
from dparallel.distillation.data import step_shape
from dparallel.distillation.hosts import check_hosts, world_size
from dparallel.distillation.quantization import check_blocks
from dparallel.distillation.settings import check_builds, check_deepspeed, check_quantization
from dparallel.models.checkpoints import choose_format, load_tokenizer, read_config
from dparallel.models.lora import check_targets
from dparallel.models.placement import empty_model
from dparallel.preflight.plan import Prompts
from dparallel.problems.prompts import encode_problems
from dparallel.problems.registry import check_disjoint, load_problems


def check_inputs(settings: DistillConfig) -> Prompts:
    """Refuse settings and inputs that cannot run or do not fit each other; returns the prompts' lengths.

    Raises:
        ValueError: (`ConfigError`, `CheckpointError`, `ProblemsError`) naming what is wrong and the remedy.
    """
    check_folder(Path(settings.runs))
    check_deepspeed(settings.training.deepspeed)
    check_quantization(settings.training)
    check_builds(settings.training.deepspeed)
    _check_launch(settings)
    _check_recipes(settings)
    return _check_teacher(settings)


def check_folder(folder: Path) -> None:
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
        if misfit := recipe.misfit(gen_length):
            raise ConfigError(
                f"students.{name}.{misfit} does not divide "
                f"trajectories.decoding.gen_length={gen_length}: choose a divisor of {gen_length}"
            )
        for sweep in settings.benchmark.sweeps_of(name):
            mode = settings.benchmark.sweeps[sweep].decoding.mode
            if (mode == "pipelined") != (recipe.attention == "block_causal"):
                raise ConfigError(
                    f"students.{name}.attention={recipe.attention} with benchmark.sweeps.{sweep}.decoding."
                    f"mode={mode}: a block_causal student is decoded with mode: pipelined, and no other is; "
                    f"give {name} its own sweeps in benchmark.student_sweeps"
                )


def _check_teacher(settings: DistillConfig) -> Prompts:
    """The adapter fits the teacher, which can decode every problem's prompt at the lengths asked for."""
    teacher = empty_model(read_config(settings.teacher))  # its shape and special tokens; no weights are read
    check_targets(teacher, settings.training.lora.targets)
    if settings.training.quantization is not None:
        check_blocks(teacher)
    choose_format(settings.merging.format, settings.teacher)
    if teacher.config.attention_pattern not in (None, "full"):
        raise ConfigError(
            f"{settings.teacher} has attention_pattern={teacher.config.attention_pattern!r}: a teacher "
            "must have full attention; give the model that this one was made from"
        )
    tokenizer = load_tokenizer(settings.teacher)
    benchmark = settings.benchmark
    sweeps = [benchmark.sweeps[name].decoding for name in benchmark.teacher_sweeps]
    sweeps += [benchmark.sweeps[name].decoding for name in benchmark.all_student_sweeps]
    decodings = [benchmark.reference, *benchmark.fixed.values(), *sweeps]
    longest = max(decodings, key=lambda each: each.gen_length)
    recording = settings.trajectories
    trajectories, test, validation = map(
        load_problems, (recording.problems, benchmark.test, benchmark.validation)
    )
    check_disjoint(
        {"trajectories.problems": trajectories, "benchmark.test": test, "benchmark.validation": validation}
    )
    prompts = encode_problems(
        trajectories, recording.problems.protocol, tokenizer, teacher, recording.decoding
    )
    on_test = encode_problems(test, benchmark.test.protocol, tokenizer, teacher, longest)
    on_validation = encode_problems(validation, benchmark.validation.protocol, tokenizer, teacher, longest)
    for decoding in decodings:
        check_prompts(teacher, [], decoding)
    for baseline in benchmark.baselines.values():
        model = empty_model(read_config(baseline.model))
        words = load_tokenizer(baseline.model)
        encode_problems(test, benchmark.test.protocol, words, model, baseline.decoding)
        encode_problems(validation, benchmark.validation.protocol, words, model, baseline.decoding)
    shortest = min(map(len, prompts)) + recording.decoding.gen_length
    max_length = settings.training.max_length
    if max_length is not None and max_length < shortest:
        raise ConfigError(
            f"training.max_length={max_length} leaves nothing to train on: the shortest prompt + response "
            f"has {shortest} tokens"
        )
    return Prompts(*([len(each) for each in some] for some in (prompts, on_test, on_validation)))
