"""What an experiment needs, known before any of it runs: memory, disk and forwards, from shapes alone.

Everything is an upper bound where decoding decides: every canvas is as long as that of the longest prompt of
its set, and a rule with a threshold is taken to commit one token per forward.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dparallel.config.base import ConfigError
from dparallel.config.experiment import DistillConfig
from dparallel.models.checkpoints import read_config
from dparallel.models.placement import empty_model
from dparallel.models.sizes import stored_bytes
from dparallel.preflight.disk import Progress, Sizes, disk_bytes, progress
from dparallel.preflight.memory import (
    DecodingMemory,
    TrainingShape,
    check_decoding,
    decoding_memory,
    students_memory,
    training_shape,
)
from dparallel.preflight.prompts import PromptLengths
from dparallel.preflight.remedy import check_training
from dparallel.preflight.training_memory import TrainingMemory, adapter_count, weight_count
from dparallel.preflight.units import listed, size
from dparallel.preflight.work import Forwards, forwards_by_stage

TEXT_BYTES = 5  # of a token as text, roughly


@dataclass(frozen=True)
class Plan:
    """What the experiment of `config` needs.

    Attributes:
        parameters, trainable: numbers of the teacher and of the adapter.
        training: the memory of the most demanding student; None once all are trained.
        decoding: on each GPU that records or measures.
        disk: bytes still to be written, by kind, in `runs`.
        forwards: by stage, as if nothing were done.
    """

    config: DistillConfig
    parameters: int
    trainable: int
    shape: TrainingShape
    training: TrainingMemory | None
    decoding: DecodingMemory
    disk: dict[str, int]
    forwards: dict[str, Forwards]


def make_plan(config: DistillConfig, lengths: PromptLengths, on_gpu: bool) -> Plan:
    """Plan an experiment that was checked (`preflight.checks`), from its teacher's config and its folder.

    Args:
        lengths: of all three sets of problems.
        on_gpu: whether it is to run on GPUs, where `precision: auto` is bf16.

    Raises:
        CheckpointError, AdapterError: inputs that cannot run at all.
        StageError: a finished stage in `runs` was damaged.
    """
    model = empty_model(read_config(config.teacher))
    shape = training_shape(config, max(lengths.trajectories), on_gpu)
    done = progress(config, len(lengths.trajectories))
    trained = done.trained == len(config.students)
    return Plan(
        config=config,
        parameters=weight_count(model),
        trainable=adapter_count(model, config.training.lora),
        shape=shape,
        training=None if trained else students_memory(model, config, config.training, shape),
        decoding=decoding_memory(config, lengths),
        disk=disk_needed(config, lengths.trajectories, shape, done),
        forwards=forwards_by_stage(config, lengths, shape.length),
    )


def disk_needed(
    config: DistillConfig, prompts: Sequence[int], shape: TrainingShape, done: Progress
) -> dict[str, int]:
    """Bytes still to be written, by kind.

    Args:
        prompts: lengths of the prompts of the trajectories.
    """
    gen_length = config.trajectories.decoding.gen_length
    trainable = adapter_count(empty_model(read_config(config.teacher)), config.training.lora)
    adapter = trainable * shape.dtype.itemsize
    sizes = Sizes(
        trajectory=(max(prompts) + gen_length) * (torch.int32.itemsize + TEXT_BYTES)
        + gen_length * (torch.int16.itemsize + torch.float32.itemsize),
        checkpoint=adapter + 3 * trainable * torch.float32.itemsize,
        adapter=adapter,
        merged=stored_bytes(config.teacher),
    )
    return disk_bytes(config, sizes, len(prompts), done)


def check_fits(plan: Plan, gpu_bytes: int | None, free_disk: int) -> None:
    """Refuse what cannot run to its end.

    Args:
        gpu_bytes: the memory of each GPU; None where everything runs on the CPU.
        free_disk: bytes where `runs` lies.

    Raises:
        ConfigError: with the bytes needed, the limit and settings that would fit.
    """
    if gpu_bytes is not None:
        check_decoding(plan.decoding, gpu_bytes)  # first, since no setting of training helps it
        if plan.training is not None:
            check_training(plan.config, plan.shape, plan.training, gpu_bytes)
    check_disk(plan.config.runs, plan.disk, free_disk)


def check_disk(runs: str, disk: Mapping[str, int], free_disk: int) -> None:
    """Refuse what is still to be written where it has no room, as a `ConfigError`."""
    needed = sum(disk.values())
    if needed > free_disk:
        kinds = {kind: held for kind, held in disk.items() if held}
        raise ConfigError(
            f"{runs} needs another {size(needed)} of disk ({listed(kinds)}), and "
            f"{size(free_disk)} are free: free some, set runs to a larger disk, or train fewer students"
        )
