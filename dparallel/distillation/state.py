"""The state of a training in a checkpoint, which a launch of any layout can load.

The file holds each trained weight in float32 and its two moments of AdamW, undivided. It depends neither on
the number of processes nor on DeepSpeed's ZeRO stage and offloading, which divide these tensors in memory.
The only other state is the number of train steps done: samples, random numbers and learning rate of a train
step are functions of it. With `rollouts`, the responses that the student decoded are a file beside it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import (
    link_hp_params,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from safetensors import safe_open
from torch import Tensor, nn

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")  # as AdamW names them


def gather(engine: DeepSpeedEngine, kept: bool) -> dict[str, Tensor]:
    """The state, gathered weight by weight from all processes; call it in all of them.

    Args:
        kept: whether this process keeps the tensors, on the CPU; otherwise it returns an empty dict.
    """
    state = {}
    for name, weight in trained_weights(engine.module):
        for part in (WEIGHT, *MOMENTS):
            whole = (
                safe_get_full_fp32_param(weight)
                if part == WEIGHT
                else safe_get_full_optimizer_state(weight, part)
            )
            if kept:
                state[_key(name, part)] = whole.cpu()
    return state


def load_weights(student: nn.Module, file: Path) -> None:
    """Load the weights of a state into a student that DeepSpeed does not divide yet, rounded to its dtype."""
    with safe_open(file, framework="pt") as state:
        for name, weight in trained_weights(student):
            weight.data.copy_(state.get_tensor(_key(name, WEIGHT)))


def load_optimizer(engine: DeepSpeedEngine, file: Path, train_step: int) -> None:
    """Load float32 weights, moments and step counts of the state after `train_step` into a new engine.

    The engine's student must have its weights already, see `load_weights`.
    """
    engine.global_steps = train_step
    _start_moments(engine, train_step)
    with safe_open(file, framework="pt") as state:
        for name, weight in trained_weights(engine.module):
            for part in (WEIGHT, *MOMENTS):
                _set(weight, part, state.get_tensor(_key(name, part)))


def link(engine: DeepSpeedEngine) -> None:
    """Correct where DeepSpeed looks for the float32 weights and moments of a new engine.

    With `round_robin_gradients` it orders the weights anew, and looks for them in the former order.
    """
    zero = engine.optimizer
    if not getattr(zero, "round_robin_gradients", False):
        return
    for group, weights in enumerate(zero.round_robin_bit16_groups):
        processes = zero.real_dp_process_group[group]
        partition = zero.single_partition_of_fp32_groups[group]
        link_hp_params(
            lp_param_list=weights,
            flat_hp_partition=partition,
            gradient_dict=zero.averaged_gradients,
            offload_gradient_dict=zero.offload_gradient_dict,
            use_offload=zero.cpu_offload,
            param_group_index=group,
            partition_start=torch.distributed.get_rank(processes) * partition.numel(),
            partition_size=partition.numel(),
            dp_group=processes,
            param_offsets=zero.round_robin_bit16_offsets[group],
        )


def trained_weights(student: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights of the adapter, by name."""
    return ((name, weight) for name, weight in student.named_parameters() if weight.requires_grad)


def _key(name: str, part: str) -> str:
    return f"{name}/{part}"


def _start_moments(engine: DeepSpeedEngine, train_step: int) -> None:
    """Give AdamW its state, which it would otherwise create in its first step."""
    zero, adamw = engine.optimizer, engine.basic_optimizer
    if engine.zero_optimization_partition_weights():  # stage 3
        flat_weights = zero.fp32_partitioned_groups_flat
    else:
        flat_weights = [weight for group in adamw.param_groups for weight in group["params"]]
    for flat in flat_weights:
        moments = {name: torch.zeros_like(flat, requires_grad=False) for name in MOMENTS}
        adamw.state[flat] = {"step": _step_count(adamw, train_step, flat.device), **moments}
    if not engine.zero_optimization_partition_weights():
        zero._lazy_init_hp_params_optimizer_state()  # otherwise done by the first step


def _step_count(adamw: torch.optim.Optimizer, train_step: int, device: torch.device) -> Tensor | int:
    if isinstance(adamw, DeepSpeedCPUAdam):
        return train_step
    return torch.tensor(float(train_step), device=device if adamw.defaults["fused"] else "cpu")


def _set(weight: Any, part: str, whole: Tensor) -> None:
    """Set this process's part of a weight's float32 value or moment."""
    if not hasattr(weight, "ds_tensor"):  # ZeRO stages 1 and 2
        if part == WEIGHT:
            safe_set_full_fp32_param(weight, whole)
        else:
            safe_set_full_optimizer_state(weight, whole, part)
        return
    # Stage 3 divides every weight evenly. DeepSpeed's own division of a whole value does not pad it.
    processes = torch.distributed.get_world_size(weight.ds_process_group)
    share = weight.ds_tensor.numel()
    padded = nn.functional.pad(whole.flatten(), (0, share * processes - whole.numel()))
    own = padded.split(share)[torch.distributed.get_rank(weight.ds_process_group)]
    if part == WEIGHT:
        safe_set_local_fp32_param(weight, own)
    else:
        safe_set_local_optimizer_state(weight, own, part)
