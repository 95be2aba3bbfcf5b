"""Speed and memory of a train step compared with a straightforward implementation. One command, one table.

    python -m benchmarks.training                        the tiny teacher, and a wide vocabulary
    python -m benchmarks.training --shape llada-8b       random weights of LLaDA's size, on a GPU

Both do the same step of certainty forcing (LoRA on all seven matrices, AdamW) on the same canvases and
compute the same loss. The straightforward one runs a separate forward pass for each view, and computes
float32 logits, probabilities and entropies at all positions. Every round times both; numbers are medians.

`activations`: on a GPU, the peak of forward and backward pass above the memory before; on a CPU, the bytes of
storages saved for the backward pass, without weights. `planned`: what `dparallel plan` estimates of our step
on a GPU. `peak`: peak of a whole step including weights; on a CPU, resident memory of the process including
libraries. `FLOPs utilisation`: FLOPs required by the loss (without recomputation, with logits only where they
are read) per second, relative to the measured rate of a large matrix product.
"""

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from benchmarks.common.hardware import (
    Forward,
    activation_bytes,
    describe,
    flops,
    measure_limits,
    peak_memory_bytes,
    reset_peak_memory,
    timed,
)
from benchmarks.common.shapes import SHAPES, TEACHER, random_model
from benchmarks.common.tables import table
from benchmarks.decoding_report import Mark, marks_table
from dparallel.config.experiment import LoraSettings, OptimizerConfig, TrainingConfig
from dparallel.config.recipe import RecipeConfig
from dparallel.distillation.recipe import Batch, loss, make_batch, make_views
from dparallel.models.backbone import DiffusionConfig
from dparallel.models.checkpoints import read_config
from dparallel.models.lora import attach
from dparallel.models.placement import empty_model
from dparallel.preflight import training_memory
from dparallel.stages.streams import set_encodings

StepLoss = Callable[[PeftModel, Batch, RecipeConfig], Tensor]


@dataclass(frozen=True)
class Work:
    """A training workload: `samples` prompts of `prompt_length` with responses, two views each."""

    name: str
    config: DiffusionConfig
    prompt_length: int
    gen_length: int
    block_length: int
    samples: int
    rank: int
    gradient_checkpointing: bool = False

    @property
    def recipe(self) -> RecipeConfig:
        return RecipeConfig(
            block_length=self.block_length, masking="random", complement=True, certainty_weight=2.0
        )


def our_loss(model: PeftModel, batch: Batch, recipe: RecipeConfig) -> Tensor:
    """The loss as the training stage computes it."""
    logits = model(**batch.student_inputs)
    return loss(logits, batch, recipe).loss


def straightforward_loss(model: PeftModel, batch: Batch, recipe: RecipeConfig) -> Tensor:
    """The same loss with a forward pass per view, and everything computed at all positions in float32."""
    targets = batch.canvas.masked_scatter(batch.read, batch.targets)
    total = torch.zeros((), device=batch.canvas.device)
    for first in range(recipe.views):
        rows = slice(first, None, recipe.views)
        mask = None if batch.attention_mask is None else batch.attention_mask[rows]
        read, target = batch.read[rows], targets[rows]  # (samples, L)
        logits = model(batch.canvas[rows], attention_mask=mask).float()  # (samples, L, V)
        probability = F.softmax(logits / recipe.certainty_temperature, dim=-1)
        log_probability = F.log_softmax(logits / recipe.certainty_temperature, dim=-1)
        entropy = -(probability * log_probability).sum(-1)
        cross_entropy = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
        right = read & (logits.argmax(-1) == target)
        total = total + _row_means(cross_entropy, read) + recipe.certainty_weight * _row_means(entropy, right)
    return total


def _row_means(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean over rows of each row's mean over `chosen` positions; 0 for rows without any."""
    return ((values * chosen).sum(-1) / chosen.sum(-1).clamp(min=1)).mean()


LOSSES: dict[str, StepLoss] = {"straightforward": straightforward_loss, "ours": our_loss}


@dataclass
class Result:
    """A row of the table.

    Attributes:
        needed_flops: FLOPs required by the loss, equal for both contenders.
        spent_flops: FLOPs computed.
        planned_bytes: activations as `dparallel plan` estimates them; None for the straightforward step.
        losses, seconds: of each round.
        peak_bytes: peak of a whole step including weights; on a CPU, resident memory of the process.
    """

    work: str
    contender: str
    samples: int
    tokens: int
    needed_flops: float
    spent_flops: float
    matrix_rate: float
    activation_bytes: int
    planned_bytes: int | None
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def utilisation(self) -> float:
        return self.needed_flops / self.median / self.matrix_rate


def make_step_batch(work: Work, device: torch.device) -> Batch:
    """A batch of random prompts and responses, whose content does not affect the time."""
    rng = np.random.default_rng(0)
    vocabulary = work.config.vocab_size
    prompts = [rng.integers(vocabulary, size=work.prompt_length) for _ in range(work.samples)]
    responses = rng.integers(vocabulary, size=(work.samples, work.gen_length))
    order = np.zeros(work.gen_length, dtype=np.int64)
    views = [make_views(work.recipe, response, order, (), rng) for response in responses]
    return make_batch(prompts, responses, views, work.config.mask_token_id).to(device)


def make_student(work: Work, device: torch.device, dtype: torch.dtype) -> PeftModel:
    """The model with random weights and an adapter, ready to train."""
    teacher = random_model(work.config, device, dtype)
    student = attach(teacher, LoraSettings(rank=work.rank, alpha=work.rank)).to(dtype)
    if work.gradient_checkpointing:
        teacher.activation_checkpointing_enable({"use_reentrant": False})
    return student.train()


def step_flops(work: Work, batch: Batch, student: PeftModel, read: int) -> float:
    """FLOPs of the forward pass, with `read` logits, and of the gradients of inputs and adapter matrices."""
    rows, length = batch.canvas.shape
    base = flops(Forward(rows, length, length, read), work.config)
    adapter = sum(weight.numel() for weight in student.parameters() if weight.requires_grad)
    return 2 * base + 3 * 2 * adapter * rows * length


def planned_bytes(work: Work, batch: Batch, dtype: torch.dtype) -> int:
    """What `dparallel plan` estimates for the activations of a train step on a GPU."""
    views, length = batch.canvas.shape
    training = TrainingConfig(
        lora=LoraSettings(rank=work.rank, alpha=work.rank),
        optimizer=OptimizerConfig(learning_rate=1e-6),
        train_steps=1,
        gradient_checkpointing=work.gradient_checkpointing,
    )
    return training_memory.activation_bytes(
        empty_model(work.config), training, training_memory.Pass(views, length, len(batch.targets)), dtype
    )


def measure(work: Work, device: torch.device, dtype: torch.dtype, rounds: int) -> list[Result]:
    """Time both contenders in alternation, with the same model and batch."""
    matrix_rate = measure_limits(device, dtype).matrix_rate
    student = make_student(work, device, dtype)
    batch = make_step_batch(work, device)
    optimizer = torch.optim.AdamW(
        (weight for weight in student.parameters() if weight.requires_grad), lr=1e-6
    )
    needed = step_flops(work, batch, student, len(batch.targets))
    everything = step_flops(work, batch, student, batch.canvas.numel())

    def forward(name: str) -> Tensor:
        return LOSSES[name](student, batch, work.recipe)

    def step(name: str) -> float:
        optimizer.zero_grad()
        value = forward(name)
        value.backward()
        optimizer.step()
        return value.item()

    results = []
    for name in LOSSES:
        print(f"{work.name}, {name} ...", file=sys.stderr)
        step(name)  # warm-up: the first step allocates memory and compiles
        optimizer.zero_grad()
        held = activation_bytes(partial(forward, name), student)
        spent = {"straightforward": everything, "ours": needed}[name]
        planned = planned_bytes(work, batch, dtype) if name == "ours" else None
        results.append(
            Result(work.name, name, work.samples, batch.tokens, needed, spent, matrix_rate, held, planned)
        )
    for number in range(1, rounds + 1):
        for result in results:
            reset_peak_memory(device)
            value, seconds = timed(partial(step, result.contender), device)
            print(f"{work.name}, round {number}: {result.contender}: {seconds:.3f} s", file=sys.stderr)
            result.losses.append(value)
            result.seconds.append(seconds)
            result.peak_bytes = max(result.peak_bytes, peak_memory_bytes(device))
    return results


COLUMNS: dict[str, Callable[[Result], str]] = {
    "shape": lambda row: row.work,
    "train step": lambda row: row.contender,
    "samples/s": lambda row: f"{row.samples / row.median:.2f}",
    "tokens/s": lambda row: f"{row.tokens / row.median:.0f}",
    "s/step": lambda row: f"{row.median:.3f}",
    "activations MiB": lambda row: f"{row.activation_bytes / 2**20:.0f}",
    "planned MiB": lambda row: "-" if row.planned_bytes is None else f"{row.planned_bytes / 2**20:.0f}",
    "peak GiB": lambda row: f"{row.peak_bytes / 2**30:.2f}",
    "FLOPs utilisation": lambda row: f"{row.utilisation:.0%}",
}


def marks(straightforward: Result, ours: Result) -> list[Mark]:
    """Targets: at least 1.5 times the straightforward speed, at most 0.7 of its activations."""
    pairs = zip(straightforward.seconds, ours.seconds, strict=True)
    faster = statistics.median(slow / fast for slow, fast in pairs)
    allowed = straightforward.spent_flops / ours.spent_flops
    held = ours.activation_bytes / straightforward.activation_bytes
    return [
        Mark(
            f"{ours.work}: times the straightforward speed", faster, ">=", 1.5, f"FLOPs alone: {allowed:.2f}"
        ),
        Mark(
            f"{ours.work}: of its activations",
            held,
            "<=",
            0.7,
            "every layer but the last is the same in both",
        ),
    ]


def works(shape: str | None, samples: int | None, gradient_checkpointing: bool) -> list[Work]:
    """The given shape; by default the tiny teacher's and one with a wide vocabulary; ranks as in configs/."""
    if shape is None:
        tiny = Work(
            "tiny teacher", read_config(TEACHER), 21, 36, 12, samples or 32, 32, gradient_checkpointing
        )
        return [tiny, *works("wide-vocabulary", samples, gradient_checkpointing)]
    sizes = SHAPES[shape]
    lengths = (sizes.prompt_length, sizes.gen_length, sizes.block_length)
    rank, samples = (128, samples or 1) if sizes.large else (32, samples or 4)
    return [Work(shape, sizes.config, *lengths, samples, rank, gradient_checkpointing)]


def main(arguments: Sequence[str] | None = None) -> None:
    set_encodings()
    options = _options(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    machine = describe(device)
    print(" · ".join(f"{name}: {value}" for name, value in machine.items()), f"· {dtype}")
    results, reached = [], []
    for work in works(options.shape, options.samples, options.gradient_checkpointing):
        pair = measure(work, device, dtype, options.repeat)
        results += pair
        reached += marks(*pair)
        gc.collect()
    print(f"\n{table(results, COLUMNS, texts=['shape', 'train step'])}\n\n{marks_table(reached)}")
    if options.out:
        record = {
            "machine": machine,
            "rows": [asdict(result) for result in results],
            "marks": [asdict(mark) | {"met": mark.met} for mark in reached],
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), help="only random weights of this shape")
    parser.add_argument("--samples", type=int, help="samples per step, two views each")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in both contenders")
    parser.add_argument("--repeat", type=int, default=9, help="rounds")
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--out", type=Path, help="also write everything as JSON")
    options = parser.parse_args(arguments)
    for name in ("samples", "repeat", "threads"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} {value}: give at least 1")
    if options.shape and SHAPES[options.shape].large and not torch.cuda.is_available():
        small = ", ".join(name for name, shape in SHAPES.items() if not shape.large)
        parser.error(f"--shape {options.shape} needs a GPU, and torch sees none: choose one of {small}")
    return options


if __name__ == "__main__":
    main()
