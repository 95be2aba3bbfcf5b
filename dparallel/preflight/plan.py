"""Estimate what an experiment needs before it runs: memory, disk space and forward passes, from shapes alone.

Numbers that depend on decoding are upper bounds: all canvases of a set are as long as that of its longest
prompt, and rules with a threshold commit one token per forward pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dparallel.config.base import ConfigError
from dparallel.config.experiment import DistillConfig
from dparallel.models.checkpoints import read_config
from dparallel.models.placement import empty_model
from dparallel.models.sizes import stored_bytes
from dparallel.preflight.disk import Sizes, disk_bytes
from dparallel.preflight.memory import (
    DecodingMemory,
    TrainingShape,
    check_decoding,
    decoding_memory,
    students_memory,
    training_shape,
)
from dparallel.preflight.progress import Progress, progress
from dparallel.preflight.prompts import PromptLengths
from dparallel.preflight.remedy import check_training
from dparallel.preflight.training_memory import TrainingMemory, adapter_count, weight_count
from dparallel.preflight.units import listed, size
from dparallel.preflight.work import Forwards, forwards_by_stage

TEXT_BYTES = 5  # approximate length of a token as text


@dataclass(frozen=True)
class Plan:
    """The requirements of an experiment.

    Attributes:
        config: the experiment.
        parameters, trainable: number of weights of the teacher and of the adapter.
        shape: the training setup.
        training: memory of the student that needs most; None if all students are trained.
        decoding: memory of each GPU that records or measures.
        disk: bytes still to be written to `runs`, by kind.
        forwards: forward passes that each stage still needs at most.
        fewest: the same if thresholds commit a whole block in a forward pass.
        done: what is there already, of stages that are not finished, by stage.
    """

    config: DistillConfig
    parameters: int
    trainable: int
    shape: TrainingShape
    training: TrainingMemory | None
    decoding: DecodingMemory
    disk: dict[str, int]
    forwards: dict[str, Forwards]
    fewest: dict[str, Forwards]
    done: dict[str, str]


def make_plan(config: DistillConfig, lengths: PromptLengths, on_gpu: bool) -> Plan:
    """Estimate the requirements of an experiment that passed `preflight.checks`.

    Args:
        lengths: prompt lengths of all sets of problems.
        on_gpu: whether it runs on GPUs, where `precision: auto` is bf16.

    Raises:
        CheckpointError, AdapterError: inputs that cannot run.
        StageError: a finished stage in `runs` was damaged.
    """
    model = empty_model(read_config(config.teacher))
    shape = training_shape(config, max(lengths.trajectories), on_gpu)
    done = progress(config, len(lengths.trajectories))
    trained = done.trained == len(config.recipes)
    return Plan(
        config=config,
        parameters=weight_count(model),
        trainable=adapter_count(model, config.training.lora),
        shape=shape,
        training=None if trained else students_memory(model, config, config.training, shape),
        decoding=decoding_memory(config, lengths),
        disk=disk_needed(config, lengths.trajectories, shape, done),
        forwards=forwards_by_stage(config, lengths, shape.length, done),
        fewest=forwards_by_stage(config, lengths, shape.length, done, most=False),
        done=_partly(config, len(lengths.trajectories), done),
    )


def _partly(config: DistillConfig, rows: int, done: Progress) -> dict[str, str]:
    notes = {}
    if 0 < done.rows < rows:
        notes["trajectories"] = f"{done.rows:,} of {rows:,} are recorded"
    if 0 < done.trained < len(config.recipes):
        notes["training"] = f"{done.trained} of {len(config.recipes)} students are trained"
    return notes


def disk_needed(
    config: DistillConfig, prompts: Sequence[int], shape: TrainingShape, done: Progress
) -> dict[str, int]:
    """Bytes still to be written, by kind.

    Args:
        prompts: prompt lengths of the trajectories.
    """
    gen_length = config.trajectories.decoding.gen_length
    trainable = adapter_count(empty_model(read_config(config.teacher)), config.training.lora)
    adapter = trainable * shape.dtype.itemsize
    sizes = Sizes(
        trajectory=(max(prompts) + gen_length) * (torch.int32.itemsize + TEXT_BYTES)
        + gen_length * (torch.int16.itemsize + torch.float32.itemsize),
        checkpoint=3 * trainable * torch.float32.itemsize,  # weights and two moments
        adapter=adapter,
        merged=stored_bytes(config.teacher),
    )
    return disk_bytes(config, sizes, len(prompts), done)


def check_fits(plan: Plan, gpu_bytes: int | None, free_disk: int) -> None:
    """Raise an error if memory or disk are too small.

    Args:
        gpu_bytes: memory of each GPU; None if everything runs on the CPU.
        free_disk: free bytes on the disk of `runs`.

    Raises:
        ConfigError: names the bytes needed, the limit and settings that would fit.
    """
    if gpu_bytes is not None:
        check_decoding(plan.decoding, gpu_bytes)  # checked first: no training setting helps here
        if plan.training is not None:
            check_training(plan.config, plan.shape, plan.training, gpu_bytes)
    check_disk(plan.config.runs, plan.disk, free_disk)


def check_disk(runs: str, disk: Mapping[str, int], free_disk: int) -> None:
    """Raise a ConfigError if the disk has less free space than will be written."""
    needed = sum(disk.values())
    if needed > free_disk:
        kinds = {kind: held for kind, held in disk.items() if held}
        raise ConfigError(
            f"{runs} needs another {size(needed)} of disk ({listed(kinds)}), and "
            f"{size(free_disk)} are free: free some, set runs to a larger disk, or train fewer students"
        )
