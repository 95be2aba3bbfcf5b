"""Find settings with which training fits into the available memory."""

import json
import shlex
from collections.abc import Iterable, Iterator
from typing import Any

from dparallel.config.base import HOW, ConfigError
from dparallel.config.experiment import DistillConfig, TrainingConfig
from dparallel.distillation.quantization import whole_blocks
from dparallel.distillation.settings import zero_stage
from dparallel.models.backbone import DiffusionTransformer
from dparallel.models.checkpoints import read_config
from dparallel.models.placement import empty_model
from dparallel.preflight.memory import RESERVED, TrainingShape, students_memory
from dparallel.preflight.training_memory import TrainingMemory
from dparallel.preflight.units import listed, size


def check_training(
    config: DistillConfig, shape: TrainingShape, memory: TrainingMemory, gpu_bytes: int
) -> None:
    """Raise a ConfigError with fitting settings if training does not fit into `gpu_bytes`."""
    if memory.peak + RESERVED > gpu_bytes:
        raise ConfigError(
            f"training needs {size(memory.peak)} on each GPU ({listed(memory.kinds())}) beside "
            f"{size(RESERVED)} that cannot be used, and each has {size(gpu_bytes)}: "
            f"{_remedy(config, shape, gpu_bytes)}"
        )


def _remedy(config: DistillConfig, shape: TrainingShape, gpu_bytes: int) -> str:
    """The first fitting change of settings, as text."""
    model = empty_model(read_config(config.teacher))
    fewest_views = max(recipe.views for recipe in config.recipes.values())
    for changes in ways_to_save_memory(config.training, fewest_views, shape.processes, model):
        memory = students_memory(model, config, config.training.model_copy(update=changes), shape)
        if memory.peak + RESERVED <= gpu_bytes:
            settings = " ".join(_setting(key, value) for key, value in changes.items())
            return (
                f"with --set {settings} it needs {size(memory.peak)}; {_what_becomes_of_the_begun(changes)}"
            )
    return (
        "no setting makes it fit: use larger GPUs, or more of them with ZeRO stage 3 (a training already "
        "begun goes on from its checkpoint), or a smaller lora.rank (it starts anew)"
    )


def _what_becomes_of_the_begun(changes: Iterable[str]) -> str:
    deciding = [key for key in changes if HOW not in TrainingConfig.model_fields[key].metadata]
    if deciding:
        return f"training.{deciding[0]} changes the result, so a training already begun starts anew"
    return "a training already begun goes on from its checkpoint"


def ways_to_save_memory(
    training: TrainingConfig, fewest_views: int, processes: int, model: DiffusionTransformer
) -> Iterator[dict[str, Any]]:
    """Changes of settings that save memory, from the least to the most slowdown, without changes in effect.

    Args:
        fewest_views: the smallest micro batch valid for all recipes.
    """
    tight: dict[str, Any] = {"gradient_checkpointing": True}
    zero3 = {"deepspeed": {"zero_optimization": {"stage": 3}}}
    offload = {"deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}}
    ways: list[dict[str, Any]] = [tight]
    tight = tight | {"micro_batch_size": fewest_views}
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
    """A `--set` argument; its value is YAML, of which JSON is a subset."""
    return shlex.quote(f"training.{key}={json.dumps(value)}")
