"""All that is particular to DeepSpeed: its configuration, its checkpoints, its launchers' environment."""

import json
import logging
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from peft import PeftModel
from pydantic import BaseModel
from torch import Tensor

from dparallel.config.experiment import OptimizerConfig, TrainingConfig
from dparallel.distillation.settings import (
    KEPT_CHECKPOINTS,
    REDUCE_BUCKET_SIZE,
    check_deepspeed,
    offloads_optimizer,
)
from dparallel.stages.files import give_usual_modes, write_atomically
from dparallel.stages.manifest import StageError

log = logging.getLogger(__name__)

LAUNCH_COMMAND = "torchrun --standalone --nproc_per_node N -m dparallel.distillation PLAN.json"
LATEST = "latest.json"
DIVIDING = ("sub_group_size", "round_robin_gradients", "zero_hpz_partition_size")  # the optimizer's state
SET_BY = {"precision": "training.precision"}


class LaunchError(RuntimeError):
    """Started without a launcher, or with more processes than devices."""


@dataclass(frozen=True)
class Process:
    """This process among those of the launch."""

    rank: int
    local_rank: int
    count: int

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")


class Checkpoint(BaseModel):
    """What `latest.json` points to, written once every process has written its part.

    `layout` is how the optimizer's state is divided: only the same division can read it again.
    """

    train_step: int
    processes: int
    layout: dict[str, Any] = {}

    @property
    def tag(self) -> str:
        return f"step-{self.train_step:08d}"


def launched_process() -> Process:
    """Read the launcher's environment; `LaunchError` names the right command where there is none."""
    try:
        process = Process(*(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
    except KeyError as missing:
        raise LaunchError(
            f"{missing.args[0]} is not set: training runs inside a launcher: {LAUNCH_COMMAND} "
            "(or the deepspeed launcher), one process for each GPU"
        ) from missing
    devices = torch.cuda.device_count()
    if devices and process.local_rank >= devices:
        raise LaunchError(
            f"process {process.local_rank} has no GPU of its own ({devices} here): start at most {devices}"
        )
    return process


def join(process: Process) -> None:
    """Meet the other processes of the launch."""
    deepspeed.utils.logger.setLevel(logging.WARNING)
    if torch.cuda.is_available():
        torch.cuda.set_device(process.device)
    else:
        # Its shared-memory op would be compiled at first use (a minute); gloo serves as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)


def precision(asked: str) -> torch.dtype:
    """`auto` is bf16 on GPUs that have it."""
    if asked == "auto":
        asked = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[asked]


def deepspeed_config(
    config: TrainingConfig, processes: int, micro_views: int, accumulation: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The ZeRO settings of `config.deepspeed` with everything else filled in.

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


def learning_rate_factor(optimizer: OptimizerConfig, steps_done: int, train_steps: int) -> float:
    """Multiplies the learning rate of train step `steps_done + 1`: warm-up, then the schedule."""
    warmup = round(optimizer.warmup_ratio * train_steps)
    if steps_done < warmup:
        return (steps_done + 1) / warmup
    progress = (steps_done - warmup) / max(1, train_steps - warmup)
    match optimizer.schedule:
        case "constant":
            return 1.0
        case "linear":
            return max(0.0, 1 - progress)
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def place(student: PeftModel, settings: dict[str, Any]) -> PeftModel:
    """Under ZeRO stage 3 leave each process its part of every weight; no device ever holds them all."""
    if settings["zero_optimization"]["stage"] == 3:
        deepspeed.zero.Init(module=student, config_dict_or_path=settings)
    return student


def start_engine(
    student: PeftModel, optimizer: OptimizerConfig, train_steps: int, settings: dict[str, Any]
) -> DeepSpeedEngine:
    """DeepSpeed over AdamW and a learning-rate schedule by name.

    Torch's AdamW has nothing to compile; where the optimizer is offloaded DeepSpeed's own one for
    the CPU is built at its first use, which takes minutes.
    """
    trainable = [weight for weight in student.parameters() if weight.requires_grad]
    common: dict[str, Any] = {
        "lr": optimizer.learning_rate,
        "betas": optimizer.betas,
        "weight_decay": optimizer.weight_decay,
    }
    adamw: torch.optim.Optimizer
    if offloads_optimizer(settings):
        adamw = deepspeed.ops.adam.DeepSpeedCPUAdam(trainable, **common, adamw_mode=True)
    else:  # fused on a GPU: no temporary copies
        adamw = torch.optim.AdamW(trainable, **common, fused=torch.cuda.is_available())
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adamw, lambda done: learning_rate_factor(optimizer, done, train_steps)
    )
    engine, *_ = deepspeed.initialize(model=student, optimizer=adamw, lr_scheduler=schedule, config=settings)
    return engine


def gradient_norm(engine: DeepSpeedEngine) -> float:
    """Norm over all processes before clipping, of the step just taken; not finite if it was skipped."""
    norm = float(engine.get_global_grad_norm())
    return norm if engine.was_step_applied() and norm >= 0 else math.nan


def layout(settings: dict[str, Any]) -> dict[str, Any]:
    """What of DeepSpeed's settings decides how a checkpoint is divided into files and tensors."""
    zero = settings["zero_optimization"]
    made = {"precision": "bf16" if settings["bf16"]["enabled"] else "fp32", "stage": zero["stage"]}
    if offloads_optimizer(settings):
        made["offload_optimizer"] = zero["offload_optimizer"]["device"]
    return made | {name: zero[name] for name in DIVIDING if name in zero}


def save_checkpoint(
    engine: DeepSpeedEngine, folder: Path, train_step: int, process: Process, settings: dict[str, Any]
) -> None:
    """Write a checkpoint of the adapter and the optimizer, then point to it; keep the last two."""
    made = Checkpoint(train_step=train_step, processes=process.count, layout=layout(settings))
    engine.save_checkpoint(str(folder), tag=made.tag, save_latest=False, exclude_frozen_parameters=True)
    torch.distributed.barrier()
    if process.first:
        write_atomically(folder / LATEST, made.model_dump_json())
        for old in sorted(folder.glob("step-*"))[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)


def last_checkpoint(folder: Path, process: Process, settings: dict[str, Any]) -> Checkpoint | None:
    """The last complete checkpoint; `StageError` if this launch divides its state otherwise."""
    if not (folder / LATEST).is_file():
        return None
    found = Checkpoint.model_validate_json((folder / LATEST).read_text(encoding="utf-8"))
    if found.processes != process.count:
        raise StageError(
            f"{folder} was written by {found.processes} processes, this launch has {process.count}: "
            f"resume with {found.processes}, or delete {folder} to start over"
        )
    there, here = found.layout, layout(settings)
    for name in sorted({*there, *here}):
        if there.get(name) != here.get(name):
            setting = SET_BY.get(name, f"training.deepspeed.zero_optimization.{name}")
            raise StageError(
                f"{folder} was written with {name}={there.get(name)}, this launch has {here.get(name)} and "
                f"cannot read it: resume with {setting} as it was, or delete {folder} to start over"
            )
    return found


def resume(engine: DeepSpeedEngine, folder: Path, found: Checkpoint | None, process: Process) -> int:
    """Load a checkpoint, drop what a killed run left half-written after it; returns its train step."""
    if process.first:
        for leftover in folder.glob("step-*"):
            if found is None or leftover.name > found.tag:
                shutil.rmtree(leftover)
    if found is None:
        return 0
    engine.load_checkpoint(str(folder), tag=found.tag, load_module_strict=False)
    return found.train_step


def save_adapter(engine: DeepSpeedEngine, folder: Path, process: Process) -> list[str]:
    """Write the adapter alone, in PEFT's format; returns the file names."""
    student: PeftModel = engine.module
    trainable = [weight for weight in student.parameters() if weight.requires_grad]
    with deepspeed.zero.GatheredParameters(trainable, enabled=engine.zero_optimization_partition_weights()):
        if process.first:
            student.save_pretrained(str(folder), save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)  # an empty form
            give_usual_modes([folder / "adapter_model.safetensors"])
            _sort_targets(folder / "adapter_config.json")
    return ["adapter_config.json", "adapter_model.safetensors"]


def _sort_targets(file: Path) -> None:
    """PEFT writes a set in any order; the same adapter should be the same bytes."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    write_atomically(file, json.dumps(config, indent=2, sort_keys=True))


def all_reduce(values: Tensor) -> Tensor:
    """Sum over all processes, in place."""
    torch.distributed.all_reduce(values)
    return values
