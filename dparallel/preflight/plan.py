"""What an experiment needs, known before any of it runs: memory, disk and forwards, from shapes alone.

Everything is an upper bound where decoding decides: every canvas is as long as that of the longest prompt of
its set, and a rule with a threshold is taken to commit one token per forward.
"""

import json
import math
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dparallel.config.base import ConfigError
from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import BenchmarkConfig, DistillConfig, TrainingConfig
from dparallel.decoding.memory import USABLE, row_bytes
from dparallel.distillation.data import step_shape
from dparallel.distillation.hosts import world_size
from dparallel.distillation.quantization import whole_blocks
from dparallel.distillation.settings import zero_stage
from dparallel.evaluation.measure import LATENCY_SAMPLES
from dparallel.models.backbone import DiffusionConfig, DiffusionTransformer
from dparallel.models.checkpoints import read_config
from dparallel.models.placement import empty_model
from dparallel.models.sizes import stored_bytes
from dparallel.preflight.disk import Sizes, disk_bytes, progress
from dparallel.preflight.training_memory import (
    Memory,
    Pass,
    adapter_count,
    training_memory,
    weight_count,
)

RESERVED = 2**30  # bytes of each GPU: the driver's context and what the allocator cannot use
TEXT_BYTES = 5  # of a token as text, roughly


@dataclass(frozen=True)
class Prompts:
    """Lengths in tokens of the prompts of each set of problems."""

    trajectories: Sequence[int]
    test: Sequence[int]
    validation: Sequence[int]


@dataclass(frozen=True)
class Decoding:
    """Bytes on a GPU while trajectories are recorded or models measured: never less than one row's.

    Attributes:
        weights: in the dtype they are stored in. row: at the peak of a forward.
        dtype: of the activations.
    """

    weights: int
    row: int
    dtype: torch.dtype

    @property
    def peak(self) -> int:
        return self.weights + math.ceil(self.row / USABLE)

    def kinds(self) -> dict[str, int]:
        return {"weights": self.weights, "one row": self.row}


@dataclass(frozen=True)
class Work:
    """Rows sent through the model, and their canvas tokens; a backward pass counts as forwards."""

    forwards: int
    tokens: int


@dataclass(frozen=True)
class Plan:
    """What `config` needs.

    Attributes:
        length: of the longest canvas trained on.
        parameters, trainable: of the teacher, of the adapter.
        memory: of the most demanding student, on each of `processes` GPUs; None once all are trained.
        decoding: on each GPU that records or measures.
        disk: bytes still to be written, by kind, in `runs`.
        work: by stage, as if nothing were done.
    """

    config: DistillConfig
    processes: int
    precision: str
    length: int
    parameters: int
    trainable: int
    memory: Memory | None
    decoding: Decoding
    disk: dict[str, int]
    work: dict[str, Work]


def make_plan(config: DistillConfig, prompts: Prompts, on_gpu: bool) -> Plan:
    """Plan an experiment that was checked (`dparallel.checks`), from its teacher's config and its folder.

    Args:
        on_gpu: whether it is to run on GPUs, where `precision: auto` is bf16.

    Raises:
        CheckpointError, AdapterError: inputs that cannot run at all.
        StageError: a finished stage in `runs` was damaged.
    """
    training = config.training
    teacher = read_config(config.teacher)
    model = empty_model(teacher)
    rows, longest = len(prompts.trajectories), max(prompts.trajectories)
    recorded = longest + config.trajectories.decoding.gen_length
    length = min(training.max_length or recorded, recorded)
    processes = world_size(config.launch)
    precision = training.precision
    if precision == "auto":
        precision = "bf16" if on_gpu else "fp32"
    trainable, stored = adapter_count(model, training.lora), stored_bytes(config.teacher)
    adapter = trainable * dtype_of(precision).itemsize
    sizes = Sizes(
        trajectory=recorded * (torch.int32.itemsize + TEXT_BYTES)
        + config.trajectories.decoding.gen_length * (torch.int16.itemsize + torch.float32.itemsize),
        checkpoint=adapter + 3 * trainable * torch.float32.itemsize,
        adapter=adapter,
        merged=stored,
    )
    done = progress(config, rows)
    trained = done.trained == len(config.students)
    return Plan(
        config=config,
        processes=processes,
        precision=precision,
        length=length,
        parameters=weight_count(model),
        trainable=trainable,
        memory=None if trained else _most_demanding(model, config, training, processes, length, precision),
        decoding=_decoding_memory(config, teacher, prompts, stored, weight_count(model)),
        disk=disk_bytes(config, sizes, rows, done),
        work=_work(config, prompts, length),
    )


def _decoding_memory(
    config: DistillConfig, teacher: DiffusionConfig, prompts: Prompts, stored: int, parameters: int
) -> Decoding:
    """Of the decoding whose row takes most; students are of the teacher's size and dtype."""
    dtype = torch.float32 if stored > 3 * parameters else torch.bfloat16
    rows = [
        row_bytes(teacher, max(lengths) + decoding.gen_length, decoding, dtype)
        for lengths, decoding in _decodings(config, prompts)
    ]
    return Decoding(stored, max(rows), dtype)


def _decodings(config: DistillConfig, prompts: Prompts) -> Iterator[tuple[Sequence[int], DecodingConfig]]:
    """Everything that the teacher, a student or a baseline (taken to be as large) decodes at least once."""
    benchmark = config.benchmark
    yield prompts.trajectories, config.trajectories.decoding
    names = {*benchmark.teacher_sweeps, *benchmark.all_student_sweeps}
    sweeps = [benchmark.sweeps[name].decoding for name in sorted(names)]
    baselines = [baseline.decoding for baseline in benchmark.baselines.values()]
    for decoding in (benchmark.reference, *benchmark.fixed.values(), *sweeps, *baselines):
        yield prompts.test, decoding
        yield prompts.validation, decoding


def dtype_of(precision: str) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def _most_demanding(
    model: DiffusionTransformer,
    config: DistillConfig,
    training: TrainingConfig,
    processes: int,
    length: int,
    precision: str,
) -> Memory:
    needs = []
    for recipe in config.students.values():
        samples = step_shape(training, recipe.views, processes).micro_samples
        region = recipe.region_length(config.trajectories.decoding.gen_length)
        soft = recipe.targets == "teacher"
        shapes = Pass(samples * recipe.views, length, samples * region, soft)  # two views share the region
        needs.append(training_memory(model, training, shapes, processes, dtype_of(precision)))
    return max(needs, key=lambda memory: memory.peak)


def _work(config: DistillConfig, prompts: Prompts, length: int) -> dict[str, Work]:
    training, rows = config.training, len(prompts.trajectories)
    trained = 0
    for recipe in config.students.values():
        samples = training.views_per_step // recipe.views
        steps = training.train_steps or math.ceil((training.epochs or 0) * rows / samples)
        # The backward pass multiplies each frozen matrix once, as a forward does.
        passes = (3 if training.gradient_checkpointing else 2) + (recipe.targets == "teacher")
        trained += steps * training.views_per_step * passes
    return {
        "trajectories": _decoded(prompts.trajectories, config.trajectories.decoding),
        "training": Work(trained, trained * length),
        "benchmark": _total(_measured(config.benchmark, prompts, config.students)),
    }


def _decoded(prompts: Sequence[int], decoding: DecodingConfig, alone: int = 0) -> Work:
    """Every prompt once, and `alone` of them a second time."""
    forwards = (len(prompts) + min(alone, len(prompts))) * (decoding.steps or decoding.gen_length)
    return Work(forwards, forwards * (max(prompts) + decoding.gen_length))


def _total(works: Iterable[Work]) -> Work:
    every = list(works)
    return Work(sum(each.forwards for each in every), sum(each.tokens for each in every))


def _measured(benchmark: BenchmarkConfig, prompts: Prompts, students: Iterable[str]) -> Iterator[Work]:
    """Each measurement, which also times single prompts.

    Sweeps are decoded on the validation problems, and on the test problems at one threshold; of the
    teacher there at every one, should none of them keep the accuracy.
    """
    whole = (benchmark.reference, *benchmark.fixed.values())
    both = (*whole, *(each.decoding for each in benchmark.baselines.values()))
    for decoding in both:
        yield _decoded(prompts.test, decoding, LATENCY_SAMPLES)
        yield _decoded(prompts.validation, decoding, LATENCY_SAMPLES)
    models = [(benchmark.teacher_sweeps, True)]
    models += [(benchmark.sweeps_of(student), benchmark.sweep_test) for student in students]
    for names, all_on_test in models:
        for name in names:
            decodings = benchmark.sweeps[name].decodings()
            yield from (_decoded(prompts.validation, each, LATENCY_SAMPLES) for each in decodings)
            on_test = decodings if all_on_test else decodings[:1]
            yield from (_decoded(prompts.test, each, LATENCY_SAMPLES) for each in on_test)


def check_fits(plan: Plan, gpu_bytes: int | None, free_disk: int) -> None:
    """Refuse what cannot run to its end.

    Args:
        gpu_bytes: the memory of each GPU; None where everything runs on the CPU.
        free_disk: bytes where `runs` lies.

    Raises:
        ConfigError: with the bytes needed, the limit and settings that would fit.
    """
    if gpu_bytes is not None:
        check_decoding(plan, gpu_bytes)  # first, since no setting of training helps it
        check_training(plan, gpu_bytes)
    check_disk(plan, free_disk)


def check_decoding(plan: Plan, gpu_bytes: int) -> None:
    """Refuse a teacher that cannot record or be measured, nor its students, as a `ConfigError`."""
    decoding = plan.decoding
    if decoding.peak + RESERVED > gpu_bytes:
        smaller = decoding.weights * 2 // decoding.dtype.itemsize + math.ceil(decoding.row / USABLE)
        remedy = "use larger GPUs; quantization, ZeRO and offloading are for training alone"
        if decoding.dtype == torch.float32 and smaller + RESERVED <= gpu_bytes:
            remedy = "load the teacher in bfloat16, save it once (dparallel.save_model) and name that folder"
        raise ConfigError(
            f"recording trajectories and the benchmark need {size(decoding.peak)} on each GPU "
            f"({_listed(decoding.kinds())}) beside {size(RESERVED)} that cannot be used, and each has "
            f"{size(gpu_bytes)}: {remedy}"
        )


def check_training(plan: Plan, gpu_bytes: int) -> None:
    """Refuse a training that does not fit, as a `ConfigError` with settings that would."""
    memory = plan.memory
    if memory is not None and memory.peak + RESERVED > gpu_bytes:
        raise ConfigError(
            f"training needs {size(memory.peak)} on each GPU ({_listed(asdict(memory))}) beside "
            f"{size(RESERVED)} that cannot be used, and each has {size(gpu_bytes)}: "
            f"{_remedy(plan, gpu_bytes)}"
        )


def check_disk(plan: Plan, free_disk: int) -> None:
    """Refuse what is still to be written where it has no room, as a `ConfigError`."""
    needed = sum(plan.disk.values())
    if needed > free_disk:
        kinds = {kind: held for kind, held in plan.disk.items() if held}
        raise ConfigError(
            f"{plan.config.runs} needs another {size(needed)} of disk ({_listed(kinds)}), and "
            f"{size(free_disk)} are free: free some, set runs to a larger disk, or train fewer students"
        )


def _listed(kinds: dict[str, int]) -> str:
    return ", ".join(f"{kind} {size(held)}" for kind, held in kinds.items())


def _remedy(plan: Plan, gpu_bytes: int) -> str:
    """The settings to change for the first way that fits."""
    model = empty_model(read_config(plan.config.teacher))
    training = plan.config.training
    smallest = max(recipe.views for recipe in plan.config.students.values())
    for changes in _ways(training, smallest, plan.processes, model):
        changed = training.model_copy(update=changes)
        memory = _most_demanding(model, plan.config, changed, plan.processes, plan.length, plan.precision)
        if memory.peak + RESERVED <= gpu_bytes:
            settings = " ".join(_setting(key, value) for key, value in changes.items())
            return f"with --set {settings} it needs {size(memory.peak)}"
    return "no setting makes it fit: use larger GPUs, more of them with ZeRO stage 3, or a smaller lora.rank"


def _ways(
    training: TrainingConfig, smallest: int, processes: int, model: DiffusionTransformer
) -> Iterator[dict[str, Any]]:
    """Settings to change, from the cheapest in time to the dearest; those already so are left out."""
    tight: dict[str, Any] = {"gradient_checkpointing": True}
    zero3 = {"deepspeed": {"zero_optimization": {"stage": 3}}}
    offload = {"deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}}
    ways: list[dict[str, Any]] = [tight]
    tight = tight | {"micro_batch_size": smallest}
    ways.append(tight)
    if processes > 1:
        ways.append(tight | zero3)
    four_bits = {"quantization": "nf4"} if whole_blocks(model) else None
    if four_bits and zero_stage(training.deepspeed) < 3:
        ways.append(tight | four_bits)
    ways.append(tight | offload | {"quantization": None})
    if four_bits:
        ways.append(tight | offload | four_bits)
    for way in ways:
        yield {key: value for key, value in way.items() if getattr(training, key) != value}


def _setting(key: str, value: Any) -> str:
    """`--set` takes YAML, of which JSON is a part."""
    return shlex.quote(f"training.{key}={json.dumps(value)}")


def size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.2f} MiB"
