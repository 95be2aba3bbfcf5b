"""Check an experiment's settings and inputs before any work starts."""

import copy
import importlib.util
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dparallel.config.base import ConfigError, UserError
from dparallel.config.benchmark import BenchmarkConfig, Split
from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import LEAST_TRAJECTORIES, DistillConfig
from dparallel.decoding.generate import check_prompts
from dparallel.distillation.commit_rule import misfit
from dparallel.distillation.data import step_shape
from dparallel.distillation.hosts import check_hosts, world_size
from dparallel.distillation.quantization import check_blocks
from dparallel.distillation.settings import (
    check_builds,
    check_deepspeed,
    check_quantization,
    check_rollouts,
)
from dparallel.models.adapters import check_adapter
from dparallel.models.backbone import DiffusionTransformer
from dparallel.models.checkpoints import choose_format, load_tokenizer, read_config
from dparallel.models.commit_rule import check_commit_rule, read_commit_rule
from dparallel.models.hub import checkpoint_folder
from dparallel.models.lora import check_targets
from dparallel.models.placement import empty_model
from dparallel.preflight.prompts import PromptLengths, measured_decodings
from dparallel.problems.prompts import encode_problems
from dparallel.problems.registry import check_disjoint, load_problems, protocol_of
from dparallel.problems.scoring import check_scorable, scorers_of
from dparallel.problems.sources import Problem, ProblemsError
from dparallel.rules.rules import RULES
from dparallel.stages.files import is_there
from dparallel.stages.manifest import MANIFEST, verify
from dparallel.trajectories.privileged import with_reference

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
    for trained in settings.adapters.values():
        check_adapter(teacher.config, trained.adapter)
    _check_commit_rules(settings)
    _check_commit_rule_fit(settings)
    if not {"trajectories", "benchmark"} & set(stages):
        return PromptLengths()
    recorded = load_problems(settings.trajectories.problems)
    measured = {
        name: {split: load_problems(problems) for split, problems in benchmark.splits().items()}
        for name, benchmark in settings.benchmarks.items()
    }
    for name, by_split in measured.items():
        sets = {f"benchmarks.{name}.{split}": problems for split, problems in by_split.items()}
        check_disjoint({"trajectories.problems": recorded, **sets})
        for split, problems in by_split.items():
            check_scorable(problems, protocol_of(settings.benchmarks[name].splits()[split]))
    _check_references(settings, recorded)
    if settings.merging.commit_rule is not None and len(recorded) < LEAST_TRAJECTORIES:
        raise ConfigError(
            f"merging.commit_rule with {len(recorded)} problems to record: give at least "
            f"{LEAST_TRAJECTORIES}; some are held out"
        )
    tokenizer = load_tokenizer(settings.teacher)
    trajectories: list[int] = []
    if "trajectories" in stages:
        trajectories = _check_recording(settings, recorded, teacher, tokenizer)
    if "benchmark" not in stages:
        return PromptLengths(trajectories)
    lengths = {}
    for name, by_split in measured.items():
        benchmark, setting = settings.benchmarks[name], f"benchmarks.{name}"
        told = by_split, teacher, tokenizer
        lengths[name] = _check_measuring(setting, benchmark, settings.students, *told)
        _check_baselines(benchmark, by_split)
    return PromptLengths(trajectories, lengths)


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
    for name, recipe in settings.recipes.items():
        try:
            check_rollouts(recipe, settings.training)
        except ConfigError as error:
            raise ConfigError(f"students.{name}.{error}") from error
        step_shape(settings.training, recipe.views, world_size(settings.launch))


def _check_recipes(settings: DistillConfig) -> None:
    gen_length = settings.trajectories.decoding.gen_length
    for name, recipe in settings.recipes.items():
        if recipe.needs_steps and not settings.trajectories.has_steps:
            raise ConfigError(
                f"students.{name}.masking={recipe.masking} needs the steps at which the teacher committed "
                "its tokens, and trajectories.imported.response gives finished responses without steps: use "
                "masking: random or rollouts, import whole trajectories (imported.trajectory), or record "
                "them"
            )
        if misfit := recipe.misfit(gen_length):
            raise ConfigError(
                f"students.{name}.{misfit} does not divide "
                f"trajectories.decoding.gen_length={gen_length}: choose a divisor of {gen_length}"
            )
        if recipe.rollouts and (misfit := recipe.rollouts.misfit(gen_length)):
            raise ConfigError(f"students.{name}.{misfit}")
        if recipe.teacher_prompt == "privileged" and settings.trajectories.privileged is None:
            raise ConfigError(
                f"students.{name}.teacher_prompt=privileged without trajectories.privileged: set it, for "
                "example to {decode: false}, so that prompts with the reference answers are recorded"
            )
        steps = None if settings.trajectories.imported else settings.trajectories.decoding.steps
        if recipe.near_far and recipe.needs_steps and steps is not None and recipe.near_far.delta >= steps:
            raise ConfigError(
                f"students.{name}.near_far.delta={recipe.near_far.delta} with "
                f"trajectories.decoding.steps={steps}: no token is far; choose a smaller delta, or more steps"
            )
    for name, student in settings.students.items():
        for place, benchmark in settings.benchmarks.items():
            measured = {
                f"sweeps.{sweep}": benchmark.sweeps[sweep].decoding for sweep in benchmark.sweeps_of(name)
            }
            measured |= {f"fixed.{fixed}": decoding for fixed, decoding in benchmark.fixed_of(name).items()}
            for decoded, decoding in measured.items():
                mode = decoding.mode
                if (mode == "pipelined") != (student.attention == "block_causal"):
                    raise ConfigError(
                        f"students.{name}.attention={student.attention} with "
                        f"benchmarks.{place}.{decoded}.decoding.mode={mode}: a block_causal student is "
                        f"decoded with mode: pipelined, and no other is; give {name} its own sweeps in "
                        f"benchmarks.{place}.student_sweeps"
                    )


def _check_commit_rule_fit(settings: DistillConfig) -> None:
    """A commit rule can be fitted for every student, which happens after its training."""
    rule = settings.merging.commit_rule
    for name, recipe in settings.recipes.items():
        if rule is not None and (reason := misfit(rule, settings.trajectories, recipe)):
            raise ConfigError(f"merging.commit_rule of students.{name}: {reason}")


def _check_commit_rules(settings: DistillConfig) -> None:
    """Every model that is decoded with a fitted commit rule has one, or will have one."""
    teacher, students = settings.teacher, None  # None: fitted by the students' merging
    asked: list[tuple[str, DecodingConfig, str | None]] = [
        ("trajectories.decoding", settings.trajectories.decoding, teacher)
    ]
    for place, benchmark in settings.benchmarks.items():
        sweeps = {name: sweep.decoding for name, sweep in benchmark.sweeps.items()}
        named = {"reference": benchmark.reference}
        named |= {f"fixed.{name}": decoding for name, decoding in benchmark.fixed.items()}
        named |= {f"sweeps.{name}": sweeps[name] for name in benchmark.teacher_sweeps}
        asked += [(f"benchmarks.{place}.{name}", decoding, teacher) for name, decoding in named.items()]
        for name in benchmark.sweeps_of_any(settings.students):
            asked.append((f"benchmarks.{place}.sweeps.{name}", sweeps[name], students))
        for name, rival in benchmark.baselines.items():
            if rival.decoding is not None:
                asked.append((f"benchmarks.{place}.baselines.{name}", rival.decoding, rival.model))
    for place, decoding, model in asked:
        if not RULES[decoding.rule].needs_weights:
            continue
        if model is not None:
            rule = read_commit_rule(checkpoint_folder(model, with_weights=False))
            check_commit_rule(decoding, rule, f"({model}, in {place}) whose checkpoint")
        elif settings.merging.commit_rule is None:
            raise ConfigError(
                f"{place}.rule={decoding.rule} without merging.commit_rule: give `merging: {{commit_rule: "
                "{}}` to fit the commit rule of each student"
            )


def _check_whole(settings: DistillConfig, stages: Collection[str]) -> None:
    """What the manifest beside a model lists is there, and of its size; nothing is hashed."""
    models = [settings.teacher, *(settings.baseline_models() if "benchmark" in stages else ())]
    for model in models:
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


def _check_references(settings: DistillConfig, recorded: Sequence[Problem]) -> None:
    """Check that some training problem can be scored if training needs it."""
    scorer = scorers_of(protocol_of(settings.trajectories.problems))[0]
    without = scorer.needs_reference and all(problem.reference is None for problem in recorded)
    stated = settings.trajectories.imported is not None and settings.trajectories.imported.correct is not None
    if not without or stated:
        return
    for name, recipe in settings.recipes.items():
        own = recipe.only_correct is not None
        if recipe.only_correct if own else settings.training.only_correct:
            setting = f"students.{name}.only_correct" if own else "training.only_correct"
            raise ProblemsError(
                f"trajectories.problems: none of the {len(recorded)} problems has a reference, so no "
                f"trajectory can be known to be correct, and {setting}=true would leave none to train on: "
                f"name the column of the references, or set {setting}=false"
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
    if recording.privileged is not None:
        asked = with_reference(problems, recording.privileged)
        encode_problems(asked, protocol_of(recording.problems), tokenizer, teacher, recording.decoding)
    lengths = [len(prompt) for prompt in prompts]
    shortest = min(lengths) + recording.decoding.gen_length
    if max_length is not None and max_length < shortest:
        raise ConfigError(
            f"training.max_length={max_length} leaves nothing to train on: the shortest prompt + response "
            f"has {shortest} tokens"
        )
    return lengths


def _check_measuring(
    setting: str,
    benchmark: BenchmarkConfig,
    students: Iterable[str],
    problems: Mapping[Split, Sequence[Problem]],
    teacher: DiffusionTransformer,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[Split, list[int]]:
    """Check that models of the teacher's shape can decode all problems with every measured decoding."""
    decodings = measured_decodings(benchmark, setting, students)
    student = copy.copy(teacher)  # of any attention pattern: its sweeps are checked with its recipe
    student.config = copy.copy(teacher.config)
    student.config.attention_pattern = None
    of_teacher = {f"{setting}.sweeps.{name}.decoding" for name in benchmark.teacher_sweeps}
    for name, decoding in decodings.items():
        measured = student if ".sweeps." in name and name not in of_teacher else teacher
        try:
            check_prompts(measured, [], decoding)
        except UserError as error:
            raise ConfigError(f"{name}: {error}") from error
    longest = max(decodings.values(), key=lambda decoding: decoding.gen_length)
    lengths: dict[Split, list[int]] = {}
    for split, of_split in problems.items():
        protocol = protocol_of(benchmark.splits()[split])
        lengths[split] = list(map(len, encode_problems(of_split, protocol, tokenizer, teacher, longest)))
    return lengths


def _check_baselines(benchmark: BenchmarkConfig, problems: Mapping[Split, Sequence[Problem]]) -> None:
    """Check that the baselines can decode all measured problems."""
    for name, decoding in benchmark.baseline_decodings.items():
        path = benchmark.baselines[name].model
        model, tokenizer = empty_model(read_config(path)), load_tokenizer(path)
        for split, of_split in problems.items():
            protocol = protocol_of(benchmark.splits()[split])
            encode_problems(of_split, protocol, tokenizer, model, decoding)
