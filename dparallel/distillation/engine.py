"""The interface to DeepSpeed: configuration, checkpoints, and the environment set by launchers."""

import json
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read by the following import; avoids its warning

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from dparallel.config.base import UserError
from dparallel.config.experiment import OptimizerConfig, TrainingConfig
from dparallel.distillation import resuming, state
from dparallel.distillation.optimizer import adamw, learning_rate_factor
from dparallel.distillation.settings import REDUCE_BUCKET_SIZE, check_deepspeed, compiles_optimizer
from dparallel.stages.files import FileError, give_usual_modes, naming_the_file, write_atomically

log = logging.getLogger(__name__)

LAUNCH_COMMAND = "torchrun --standalone --nproc_per_node N -m dparallel.distillation PLAN.json"


class NotLaunchedError(UserError):
    """Training was started without a launcher, or with more processes than GPUs."""


@dataclass(frozen=True)
class Process:
    """A training process, identified by its ranks in the launch."""

    rank: int
    local_rank: int
    count: int

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def launched_process() -> Process:
    """Read the launcher's environment variables; NotLaunchedError names the right command if not set."""
    try:
        process = Process(*(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
    except KeyError as missing:
        raise NotLaunchedError(
            f"{missing.args[0]} is not set: training runs inside a launcher: {LAUNCH_COMMAND} "
            "(or the deepspeed launcher), one process for each GPU"
        ) from missing
    devices = torch.cuda.device_count()
    if devices and process.local_rank >= devices:
        raise NotLaunchedError(
            f"process {process.local_rank} has no GPU (this machine has {devices}): start at most {devices}"
        )
    return process


def join(process: Process) -> None:
    """Initialize communication with the other processes of the launch."""
    deepspeed.utils.logger.setLevel(logging.WARNING)
    if torch.cuda.is_available():
        torch.cuda.set_device(process.device)
    else:
        # DeepSpeed's shared-memory backend would be compiled at first use (a minute); gloo is sufficient.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)


def precision(asked: str) -> torch.dtype:
    """The dtype for `TrainingConfig.precision`; `auto` is bf16 on GPUs that support it, else fp32."""
    if asked == "auto":
        asked = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[asked]


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as text, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def deepspeed_config(
    config: TrainingConfig, processes: int, micro_views: int, accumulation: int, dtype: torch.dtype
) -> dict[str, Any]:
    """DeepSpeed's configuration: the ZeRO settings of `config.deepspeed`, with all other keys filled in.

    Raises:
        ConfigError: as `check_deepspeed`.
    """
    check_deepspeed(config.deepspeed)
    zero = {
        "stage": 2,
        "reduce_bucket_size": REDUCE_BUCKET_SIZE,
        **config.deepspeed.get("zero_optimization", {}),
    }
    return {
        **config.deepspeed,
        "zero_optimization": zero,
        "train_batch_size": micro_views * accumulation * processes,
        "train_micro_batch_size_per_gpu": micro_views,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": None,
    }


def start_engine(
    student: nn.Module,
    optimizer: OptimizerConfig,
    train_steps: int,
    settings: dict[str, Any],
    done: int = 0,
    state_file: Path | None = None,
) -> DeepSpeedEngine:
    """Start DeepSpeed with AdamW and its learning rate schedule.

    With ZeRO stage 3, the weights are partitioned over the processes; no device ever holds all of them.

    Args:
        done: number of train steps done before.
        state_file: state of adapter and optimizer after `done` train steps; None to start anew.
    """
    if state_file is not None:
        state.load_weights(student, state_file)
    if settings["zero_optimization"]["stage"] == 3:
        deepspeed.zero.Init(module=student, config_dict_or_path=settings)
    trained = [weight for _, weight in state.trained_weights(student)]
    optimizing = adamw(trained, optimizer, compiles_optimizer(settings))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizing, lambda steps: learning_rate_factor(optimizer, done + steps, train_steps)
    )
    engine, _, _, _ = deepspeed.initialize(
        model=student, optimizer=optimizing, lr_scheduler=schedule, config=settings
    )
    state.link(engine)
    if state_file is not None:
        state.load_optimizer(engine, state_file, done)
    return engine


def gradient_norm(engine: DeepSpeedEngine) -> float:
    """Gradient norm of the last step over all processes, before clipping; not finite if it was skipped."""
    norm = float(engine.get_global_grad_norm())
    return norm if engine.was_step_applied() and norm >= 0 else math.nan


def save_checkpoint(
    engine: DeepSpeedEngine,
    folder: Path,
    train_step: int,
    process: Process,
    save_more: Callable[[Path], None] | None = None,
) -> None:
    """Save a checkpoint of adapter and optimizer; when it is complete, the oldest one is removed.

    Args:
        save_more: writes further files into the checkpoint's folder, in the first process.

    Raises:
        FileError: the disk is full; existing checkpoints remain intact.
    """
    gathered = state.gather(engine, kept=process.first)
    if not process.first:
        return
    try:
        with naming_the_file(folder / resuming.step_tag(train_step)):
            file = resuming.begin(folder)
            save_file(gathered, file)
            if save_more is not None:
                save_more(file.parent)
            give_usual_modes(list(file.parent.iterdir()))
    except FileError:
        resuming.remove_unfinished(folder)
        raise
    resuming.keep(folder, train_step, dtype_name(engine.get_data_types()[0]))


def leave() -> None:
    """End communication with the other processes of the launch."""
    torch.distributed.destroy_process_group()


def from_first(value: Any, process: Process) -> Any:
    """Broadcast a value of the first process to all processes."""
    values = [value if process.first else None]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def save_adapter(engine: DeepSpeedEngine, folder: Path, process: Process) -> list[str]:
    """Save the adapter in PEFT's format; returns the file names."""
    student: PeftModel = engine.module
    trained = [weight for _, weight in state.trained_weights(student)]
    with deepspeed.zero.GatheredParameters(trained, enabled=engine.zero_optimization_partition_weights()):
        if process.first:
            with naming_the_file(folder):
                student.save_pretrained(str(folder), save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty template
            _sort_targets(folder / "adapter_config.json")
            give_usual_modes([folder / "adapter_model.safetensors"])
    return ["adapter_config.json", "adapter_model.safetensors"]


def _sort_targets(file: Path) -> None:
    """Sort PEFT's target modules, which have no fixed order, so that equal adapters have equal bytes."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    write_atomically(file, json.dumps(config, indent=2, sort_keys=True))


def all_reduce(values: Tensor) -> Tensor:
    """Sum over all processes, in place."""
    torch.distributed.all_reduce(values)
    return values
