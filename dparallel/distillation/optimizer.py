"""AdamW and its learning rate schedule."""

import math
from collections.abc import Iterable

import deepspeed
import torch

from dparallel.config.experiment import OptimizerConfig


def adamw(
    weights: Iterable[torch.nn.Parameter], settings: OptimizerConfig, compiled: bool
) -> torch.optim.Optimizer:
    """Torch's AdamW, or DeepSpeed's for the CPU, which is compiled at first use; that takes minutes."""
    trained = list(weights)
    if compiled:
        return deepspeed.ops.adam.DeepSpeedCPUAdam(
            trained,
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            adamw_mode=True,
        )
    return torch.optim.AdamW(
        trained,
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=torch.cuda.is_available(),  # avoids temporary copies on a GPU
    )


def learning_rate_factor(settings: OptimizerConfig, steps_done: int, train_steps: int) -> float:
    """Factor of the learning rate in train step `steps_done + 1`: warm-up, then the schedule."""
    warmup = round(settings.warmup_ratio * train_steps)
    if steps_done < warmup:
        return (steps_done + 1) / warmup
    progress = (steps_done - warmup) / max(1, train_steps - warmup)
    match settings.schedule:
        case "constant":
            return 1.0
        case "linear":
            return max(0.0, 1 - progress)
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
