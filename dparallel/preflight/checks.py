"""Check an experiment's settings and inputs before any work starts."""

import importlib.util
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dparallel.config.base import ConfigError, UserError
from dparallel.config.experiment import DistillConfig
from dparallel.decoding.generate import check_prompts
from dparallel.distillation.data import step_shape
from dparallel.distillation.hosts import check_hosts, world_size
from dparallel.distillation.quantization import check_blocks
from dparallel.distillation.settings import check_builds, check_deepspeed, check_quantization
from dparallel.models.backbone import DiffusionTransformer
from dparallel.models.checkpoints import choose_format, load_tokenizer, read_config
from dparallel.models.hub import checkpoint_folder
from dparallel.models.lora import check_targets
from dparallel.models.placement import empty_model
from dparallel.preflight.prompts import PromptLengths, measured_decodings
from dparallel.problems.prompts import encode_problems
from dparallel.problems.registry import check_disjoint, load_problems, protocol_of
from dparallel.problems.scoring import check_scorable, scorers_of
from dparallel.problems.sources import Problem, ProblemsError
from dparallel.stages.files import is_there
from dparallel.stages.manifest import MANIFEST, verify

STAGES = ("trajectories", "training", "merging", "benchmark")


def check_experiment(settings: DistillConfig, stages: Collection[str] = STAGES) -> PromptLengths:
    """Raise an error for settings and inputs that cannot run or do not fit together.

    Args:
        stages: the stages to run. Problems are read only if trajectories are recorded or models are measured,
            and only problems of these stages are tokenized, which takes longest.

    Returns:
        Lengths of the prompts; empty for sets of problems that `stages` do not use.

    Raises:
        UserError: names the mistake and the remedy.
    """
    check_folder(Path(settings.runs))
    check_deepspeed(settings.training.deepspeed)
    check_quantization(settings.training)
    check_builds(settings.training.deepspeed)
    _check_launch(settings)
    _check_recipes(settings)
    _check_whole(settings, stages)
    teacher = empty_model(read_config(settings.teacher))
    _check_teacher(settings, teacher)
    if not {"trajectories", "benchmark"} & set(stages):
        return PromptLengths()
    benchmark = settings.benchmark
    sets = {
        "trajectories.problems": load_problems(settings.trajectories.problems),
        "benchmark.test": load_problems(benchmark.test),
        "benchmark.validation": load_problems(benchmark.validation),
    }
    recorded, test, validation = sets.values()
    check_disjoint(sets)
    _check_references(settings, sets)
    tokenizer = load_tokenizer(settings.teacher)
    trajectories: list[int] = []
    if "trajectories" in stages:
        trajectories = _check_recording(settings, recorded, teacher, tokenizer)
    if "benchmark" not in stages:
        return PromptLengths(trajectories)
    on_test, on_validation = _check_measuring(settings, test, validation, teacher, tokenizer)
    _check_baselines(settings, test, validation)
    return PromptLengths(trajectories, on_test, on_validation)


def check_folder(folder: Path) -> None:
    """Raise a ConfigError if `folder` cannot be created or written to."""
    existing = folder
    try:
        for path in (folder, *folder.parents):
            if path.exists() and not path.is_dir():
                raise ConfigError(f"{folder} cannot be a folder: {path} is a file")
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written to ({error.strerror}: {existing}): make it writable, or name "
            "another folder"
        ) from error


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


def _check_whole(settings: DistillConfig, stages: Collection[str]) -> None:
    """What the manifest beside a model lists is there, and of its size; nothing is hashed."""
    baselines = settings.benchmark.baselines.values() if "benchmark" in stages else ()
    for model in (settings.teacher, *(baseline.model for baseline in baselines)):
        folder = checkpoint_folder(model, with_weights=False)
        if is_there(folder / MANIFEST):
            verify(folder, hashed=False)


def _check_teacher(settings: DistillConfig, teacher: DiffusionTransformer) -> None:
    """Check that adapter and checkpoint format fit the teacher, and that it has full attention."""
    check_targets(teacher, settings.training.lora.targets)
    if settings.training.quantization is not None:
        check_blocks(teacher)
    choose_format(settings.merging.format, settings.teacher)
    if teacher.config.attention_pattern not in (None, "full"):
        raise ConfigError(
            f"{settings.teacher} has attention_pattern={teacher.config.attention_pattern!r}: a teacher "
            "must have full attention; give the model that this one was made from"
        )


def _check_references(settings: DistillConfig, sets: dict[str, list[Problem]]) -> None:
    """Check that all measured problems can be scored, and that some training problem can."""
    check_scorable(sets["benchmark.test"], protocol_of(settings.benchmark.test))
    check_scorable(sets["benchmark.validation"], protocol_of(settings.benchmark.validation))
    recorded = sets["trajectories.problems"]
    scorer = scorers_of(protocol_of(settings.trajectories.problems))[0]
    without = scorer.needs_reference and all(problem.reference is None for problem in recorded)
    if settings.training.only_correct and without:
        raise ProblemsError(
            f"trajectories.problems: none of the {len(recorded)} problems has a reference, so no trajectory "
            "can be known to be correct, and training.only_correct=true would leave none to train on: name "
            "the column of the references, or set training.only_correct=false"
        )


def _check_recording(
    settings: DistillConfig,
    problems: Sequence[Problem],
    teacher: DiffusionTransformer,
    tokenizer: PreTrainedTokenizerBase,
) -> list[int]:
    """Check that the teacher can decode all problems, and that some trajectory is within max_length."""
    recording, max_length = settings.trajectories, settings.training.max_length
    prompts = encode_problems(
        problems, protocol_of(recording.problems), tokenizer, teacher, recording.decoding
    )
    lengths = [len(prompt) for prompt in prompts]
    shortest = min(lengths) + recording.decoding.gen_length
    if max_length is not None and max_length < shortest:
        raise ConfigError(
            f"training.max_length={max_length} leaves nothing to train on: the shortest prompt + response "
            f"has {shortest} tokens"
        )
    return lengths


def _check_measuring(
    settings: DistillConfig,
    test: Sequence[Problem],
    validation: Sequence[Problem],
    teacher: DiffusionTransformer,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[int], list[int]]:
    """Check that models of the teacher's shape can decode all problems with every measured decoding."""
    benchmark = settings.benchmark
    decodings = measured_decodings(benchmark)
    for name, decoding in decodings.items():
        try:
            check_prompts(teacher, [], decoding)
        except UserError as error:
            raise ConfigError(f"{name}: {error}") from error
    longest = max(decodings.values(), key=lambda decoding: decoding.gen_length)
    on_test = encode_problems(test, protocol_of(benchmark.test), tokenizer, teacher, longest)
    on_validation = encode_problems(
        validation, protocol_of(benchmark.validation), tokenizer, teacher, longest
    )
    return [len(prompt) for prompt in on_test], [len(prompt) for prompt in on_validation]


def _check_baselines(settings: DistillConfig, test: Sequence[Problem], validation: Sequence[Problem]) -> None:
    """Check that the baselines can decode all measured problems."""
    benchmark = settings.benchmark
    for baseline in benchmark.baselines.values():
        model, tokenizer = empty_model(read_config(baseline.model)), load_tokenizer(baseline.model)
        encode_problems(test, protocol_of(benchmark.test), tokenizer, model, baseline.decoding)
        encode_problems(validation, protocol_of(benchmark.validation), tokenizer, model, baseline.decoding)
