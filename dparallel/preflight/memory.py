"""Estimate the GPU memory that an experiment needs for decoding and training, and compare with the limit."""

import math
from dataclasses import dataclass

import torch

from dparallel.config.base import ConfigError
from dparallel.config.experiment import DistillConfig, TrainingConfig
from dparallel.decoding.memory import USABLE, row_bytes
from dparallel.distillation.data import step_shape
from dparallel.distillation.hosts import world_size
from dparallel.models.backbone import DiffusionTransformer
from dparallel.models.checkpoints import read_config
from dparallel.models.placement import empty_model
from dparallel.models.sizes import stored_bytes
from dparallel.preflight.prompts import PromptLengths, decodings
from dparallel.preflight.training_memory import (
    Pass,
    TrainingMemory,
    training_memory,
    weight_count,
)
from dparallel.preflight.units import listed, size

RESERVED = 2**30  # bytes per GPU for the driver's context and fragmentation of the allocator
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class DecodingMemory:
    """Bytes on a GPU that records trajectories or measures models, with one row decoded at a time.

    Attributes:
        weights: bytes of the weights in their stored dtypes.
        row: bytes of a row at the peak of a forward pass.
        dtype: dtype of the activations.
    """

    weights: int
    row: int
    dtype: torch.dtype

    @property
    def peak(self) -> int:
        return self.weights + math.ceil(self.row / USABLE)

    def kinds(self) -> dict[str, int]:
        """Bytes by kind, for messages and tables."""
        return {"weights": self.weights, "one row": self.row}


@dataclass(frozen=True)
class TrainingShape:
    """Training setup: number of processes, precision, and tokens of the longest training canvas."""

    processes: int
    precision: str
    length: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]


def decoding_memory(config: DistillConfig, lengths: PromptLengths) -> DecodingMemory:
    """Memory of the decoding with the largest rows, assuming that all models have the teacher's size."""
    teacher, stored = read_config(config.teacher), stored_bytes(config.teacher)
    dtype = torch.float32 if stored > 3 * weight_count(empty_model(teacher)) else torch.bfloat16
    rows = [
        row_bytes(teacher, max(prompts) + decoding.gen_length, decoding, dtype)
        for prompts, decoding in decodings(config, lengths)
    ]
    return DecodingMemory(stored, max(rows), dtype)


def training_shape(config: DistillConfig, longest_prompt: int, on_gpu: bool) -> TrainingShape:
    """The training setup of `config`; `precision: auto` is bf16 on GPUs."""
    precision = config.training.precision
    if precision == "auto":
        precision = "bf16" if on_gpu else "fp32"
    recorded = longest_prompt + config.trajectories.decoding.gen_length
    length = min(config.training.max_length or recorded, recorded)
    return TrainingShape(world_size(config.launch), precision, length)


def students_memory(
    model: DiffusionTransformer, config: DistillConfig, training: TrainingConfig, shape: TrainingShape
) -> TrainingMemory:
    """Training memory on each GPU, for the student that needs most.

    Args:
        model: the teacher's `empty_model`.
        training: training settings, those of `config` or a variant of them.
    """
    needs = []
    for recipe in config.recipes.values():
        samples = step_shape(training, recipe.views, shape.processes).micro_samples
        region = recipe.region_length(config.trajectories.decoding.gen_length)
        soft = recipe.asks_teacher
        shapes = Pass(
            samples * recipe.views, shape.length, samples * region, soft
        )  # the views divide the region
        needs.append(training_memory(model, training, shapes, shape.processes, shape.dtype))
    return max(needs, key=lambda memory: memory.peak)


def check_decoding(decoding: DecodingMemory, gpu_bytes: int) -> None:
    """Raise a ConfigError if the teacher can neither record trajectories nor be measured on such a GPU."""
    if decoding.peak + RESERVED > gpu_bytes:
        smaller = decoding.weights * 2 // decoding.dtype.itemsize + math.ceil(decoding.row / USABLE)
        remedy = "use larger GPUs; quantization, ZeRO and offloading apply to training only"
        if decoding.dtype == torch.float32 and smaller + RESERVED <= gpu_bytes:
            remedy = "load the teacher in bfloat16, save it once (dparallel.save_model) and name that folder"
        raise ConfigError(
            f"recording trajectories and the benchmark need {size(decoding.peak)} on each GPU "
            f"({listed(decoding.kinds())}) beside {size(RESERVED)} that cannot be used, and each has "
            f"{size(gpu_bytes)}: {remedy}"
        )
