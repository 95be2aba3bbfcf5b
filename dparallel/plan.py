"""What an experiment needs, known before any of it runs: memory, disk and forwards, from shapes alone.

Everything is an upper bound where the problems decide: canvases are as long as `training.max_length`
(or the model) allows, and a rule with a threshold is taken to commit one token per forward.
"""

import json
import math
import shlex
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dparallel.config import BenchmarkConfig, ConfigError, DecodingConfig, DistillConfig, TrainingConfig
from dparallel.decoding.memory import free_bytes
from dparallel.distillation.data import step_shape
from dparallel.distillation.hosts import world_size
from dparallel.distillation.memory import (
    Memory,
    Pass,
    adapter_count,
    empty_model,
    training_memory,
    weight_count,
)
from dparallel.distillation.settings import (
    KEPT_CHECKPOINTS,
    check_deepspeed,
    check_quantization,
    zero_stage,
)
from dparallel.evaluation.benchmarks import load_problems
from dparallel.models.backbone import DiffusionTransformer
from dparallel.models.checkpoints import load_model, read_config

RESERVED = 2**30  # bytes of each GPU: the driver's context and what the allocator cannot use
TEXT_BYTES = 5  # of a token as text, roughly
FORWARDS, RATE_ROWS = 3, 8  # timed for the rate
LOADABLE = 0.8  # of the free memory; the rest is for a forward


@dataclass(frozen=True)
class Work:
    """Rows sent through the model, and their canvas tokens; a backward pass counts as forwards."""

    forwards: int
    tokens: int


@dataclass(frozen=True)
class Plan:
    """What `config` needs.

    Attributes:
        parameters, trainable: of the teacher, of the adapter.
        memory: of the most demanding student, on each of `processes` GPUs.
        disk: bytes by kind, in `runs`.
        work: by stage.
    """

    config: DistillConfig
    processes: int
    precision: str
    length: int
    parameters: int
    trainable: int
    memory: Memory
    disk: dict[str, int]
    work: dict[str, Work]


def make_plan(config: DistillConfig, on_gpu: bool) -> Plan:
    """Plan an experiment from its config, its problems and its teacher's config.json.

    Args:
        on_gpu: whether it is to run on GPUs, where `precision: auto` is bf16.

    Raises:
        ConfigError, CheckpointError, ProblemsError, AdapterError: settings or inputs that cannot run at all.
    """
    training = config.training
    check_deepspeed(training.deepspeed)
    check_quantization(training)
    teacher = read_config(config.teacher)
    model = empty_model(teacher)
    length = min(training.max_length or teacher.max_position_embeddings, teacher.max_position_embeddings)
    processes = world_size(config.launch)
    precision = training.precision
    if precision == "auto":
        precision = "bf16" if on_gpu else "fp32"
    trainable = adapter_count(model, training.lora)
    rows = len(load_problems(config.trajectories.problems))
    work = _work(config, rows, length)
    stored = getattr(teacher, "dtype", None) or torch.bfloat16
    return Plan(
        config=config,
        processes=processes,
        precision=precision,
        length=length,
        parameters=weight_count(model),
        trainable=trainable,
        memory=_most_demanding(model, config, training, processes, length, precision),
        disk=_disk(config, rows, length, trainable, weight_count(model), stored, precision),
        work=work,
    )


def _dtype(precision: str) -> torch.dtype:
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
        region = recipe.block_length or config.trajectories.decoding.gen_length
        shapes = Pass(samples * recipe.views, length, samples * region)  # two views share the region
        needs.append(training_memory(model, training, shapes, processes, _dtype(precision)))
    return max(needs, key=lambda memory: memory.peak)


def _disk(
    config: DistillConfig,
    rows: int,
    length: int,
    trainable: int,
    parameters: int,
    stored: torch.dtype,
    precision: str,
) -> dict[str, int]:
    """Bytes by kind, nothing compressed. While a checkpoint is written, the ones before it still stand."""
    row = length * (torch.int32.itemsize + TEXT_BYTES)
    row += config.trajectories.decoding.gen_length * (torch.int16.itemsize + torch.float32.itemsize)
    adapter = trainable * _dtype(precision).itemsize
    checkpoint = adapter + 3 * trainable * torch.float32.itemsize
    students = len(config.students)
    return {
        "trajectories": rows * row,
        "checkpoints": students * (KEPT_CHECKPOINTS + 1) * checkpoint,
        "adapters": students * adapter,
        "merged models": students * parameters * stored.itemsize,
    }


def _work(config: DistillConfig, rows: int, length: int) -> dict[str, Work]:
    training = config.training
    recorded = rows * _nfe(config.trajectories.decoding)
    trained = 0
    for recipe in config.students.values():
        samples = training.views_per_step // recipe.views
        steps = training.train_steps or math.ceil((training.epochs or 0) * rows / samples)
        # The backward pass multiplies each frozen matrix once, as a forward does.
        trained += steps * training.views_per_step * (3 if training.gradient_checkpointing else 2)
    measured = sum(_benchmark_forwards(config.benchmark, len(config.students)))
    forwards = {"trajectories": recorded, "training": trained, "benchmark": measured}
    return {stage: Work(count, count * length) for stage, count in forwards.items()}


def _nfe(decoding: DecodingConfig) -> int:
    return decoding.steps or decoding.gen_length


def _benchmark_forwards(benchmark: BenchmarkConfig, students: int) -> Iterator[int]:
    """The reference on both sets; sweeps on the validation problems and an operating point on the test's."""
    test, validation = len(load_problems(benchmark.test)), len(load_problems(benchmark.validation))
    yield (test + validation) * _nfe(benchmark.reference)
    yield from (test * _nfe(each) for each in benchmark.fixed.values())
    on_test = len if benchmark.sweep_test else lambda decodings: 1
    for names, models in ((benchmark.teacher_sweeps, 1), (benchmark.student_sweeps, students)):
        for name in names:
            decodings = benchmark.sweeps[name].decodings()
            rows = len(decodings) * validation + on_test(decodings) * test
            yield models * rows * _nfe(benchmark.sweeps[name].decoding)


def check_fits(plan: Plan, gpu_bytes: int | None, free_disk: int) -> None:
    """Refuse what cannot run to its end.

    Args:
        gpu_bytes: the memory of each GPU; None where training runs on the CPU.
        free_disk: bytes where `runs` lies.

    Raises:
        ConfigError: with the bytes needed, the limit and settings that would fit.
    """
    if gpu_bytes is not None and plan.memory.peak + RESERVED > gpu_bytes:
        kinds = ", ".join(f"{kind} {size(held)}" for kind, held in plan.memory.kinds().items())
        raise ConfigError(
            f"training needs {size(plan.memory.peak)} on each GPU ({kinds}) beside {size(RESERVED)} that "
            f"cannot be used, and each has {size(gpu_bytes)}: {_remedy(plan, gpu_bytes)}"
        )
    needed = sum(plan.disk.values())
    if needed > free_disk:
        kinds = ", ".join(f"{kind} {size(held)}" for kind, held in plan.disk.items())
        raise ConfigError(
            f"{plan.config.runs} needs {size(needed)} of disk ({kinds}), and {size(free_disk)} are free: "
            "free some, set runs to a larger disk, or train fewer students"
        )


def _remedy(plan: Plan, gpu_bytes: int) -> str:
    """The settings to change for the first way that fits."""
    model = empty_model(read_config(plan.config.teacher))
    training = plan.config.training
    smallest = max(recipe.views for recipe in plan.config.students.values())
    for changes in _ways(training, smallest, plan.processes):
        changed = training.model_copy(update=changes)
        memory = _most_demanding(model, plan.config, changed, plan.processes, plan.length, plan.precision)
        if memory.peak + RESERVED <= gpu_bytes:
            settings = " ".join(_setting(key, value) for key, value in changes.items())
            return f"with --set {settings} it needs {size(memory.peak)}"
    return "no setting makes it fit: use larger GPUs, more of them with ZeRO stage 3, or a smaller lora.rank"


def _ways(training: TrainingConfig, smallest: int, processes: int) -> Iterator[dict[str, Any]]:
    """Settings to change, from the cheapest in time to the dearest; those already so are left out."""
    tight: dict[str, Any] = {"gradient_checkpointing": True}
    zero3 = {"deepspeed": {"zero_optimization": {"stage": 3}}}
    offload = {"deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}}
    ways: list[dict[str, Any]] = [tight]
    tight = tight | {"micro_batch_size": smallest}
    ways.append(tight)
    if processes > 1:
        ways.append(tight | zero3)
    if zero_stage(training.deepspeed) < 3:
        ways.append(tight | {"quantization": "nf4"})
    ways += [tight | offload | {"quantization": None}, tight | offload | {"quantization": "nf4"}]
    for way in ways:
        yield {key: value for key, value in way.items() if getattr(training, key) != value}


def _setting(key: str, value: Any) -> str:
    """`--set` takes YAML, of which JSON is a part."""
    return shlex.quote(f"training.{key}={json.dumps(value)}")


def size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.2f} MiB"


def free_disk(folder: str | Path) -> int:
    """Bytes free where `folder` is or will be."""
    path = Path(folder).absolute()
    return shutil.disk_usage(next(each for each in (path, *path.parents) if each.exists())).free


@dataclass(frozen=True)
class Rate:
    """Canvas tokens through the model in a second, forward, and where the number is from."""

    tokens_per_second: float
    origin: str

    def hours(self, work: Iterable[Work]) -> float:
        return sum(each.tokens for each in work) / self.tokens_per_second / 3600


def measure_rate(plan: Plan) -> Rate | None:
    """Time a few forwards of the real teacher; None if it does not fit into this machine's memory."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = _dtype(plan.precision)
    if plan.parameters * dtype.itemsize > LOADABLE * free_bytes(device):
        return None
    model = load_model(plan.config.teacher, device, dtype)
    rows = min(plan.config.trajectories.batch_size, RATE_ROWS)
    canvas = torch.randint(model.config.vocab_size, (rows, plan.length), device=device)
    read = torch.arange(plan.config.trajectories.decoding.block_length, device=device).expand(rows, -1)
    seconds = [_forward_seconds(model, canvas, read) for _ in range(1 + FORWARDS)][1:]
    rate = canvas.numel() / statistics.median(seconds)
    return Rate(rate, f"measured here, {FORWARDS} forwards of {rows} x {plan.length} tokens on {device.type}")


@torch.inference_mode()
def _forward_seconds(model: DiffusionTransformer, canvas: torch.Tensor, read: torch.Tensor) -> float:
    began = time.perf_counter()
    model(canvas, logits_at=read).sum().item()  # waits for the device
    return time.perf_counter() - began
