"""Validate the DeepSpeed and quantization settings.

DeepSpeed is imported only if there are settings to validate; bitsandbytes is never imported.
"""

import difflib
import importlib.util
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import psutil
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from dparallel.config.base import ConfigError
from dparallel.config.experiment import TrainingConfig
from dparallel.config.recipe import RecipeConfig
from dparallel.models.placement import name_accelerator

KEPT_CHECKPOINTS = 2
REDUCE_BUCKET_SIZE = 50_000_000  # elements; DeepSpeed's default of 500 million exceeds an adapter's gradients
FILLED_IN = {
    "train_batch_size": "training.views_per_step",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.micro_batch_size",
    "gradient_clipping": "training.optimizer.max_grad_norm",
    "optimizer": "training.optimizer",
    "scheduler": "training.optimizer.schedule",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "activation_checkpointing": "training.gradient_checkpointing",
    "steps_per_print": "training.log_every",
}
SECTION = "training.deepspeed"
STRICT = ConfigDict(extra="forbid", strict=True)
Dtype = Literal["fp16", "bf16", "fp32"]


class DataTypes(BaseModel):
    """DeepSpeed's section of this name, which it reads without a check."""

    model_config = STRICT

    grad_accum_dtype: Dtype | None = None
    param_dtype: Dtype | None = None
    buffer_dtype: Dtype | None = None
    keep_in_fp32_modules: list[str] = []


class DeepSpeedSettings(BaseModel):
    """DeepSpeed configuration keys that users may set. DeepSpeed itself ignores unknown keys."""

    model_config = STRICT

    zero_optimization: dict[str, Any] = {"stage": 2}
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = True
    communication_data_type: Literal["fp16", "bf16", "bfp16", "fp32"] | None = None
    data_types: DataTypes = DataTypes()
    # Of these two, ZeRO implements only the defaults, and says so when training starts.
    prescale_gradients: Literal[False] = False
    gradient_predivide_factor: Annotated[float, Field(ge=1, le=1)] = 1.0
    comms_logger: dict[str, Any] = {}
    flops_profiler: dict[str, Any] = {}
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    aio: dict[str, Any] = {}


def check_deepspeed(settings: Mapping[str, Any]) -> None:
    """Reject settings that DeepSpeed would reject at the start of training, or ignore.

    Args:
        settings: `training.deepspeed`; empty means ZeRO stage 2.

    Raises:
        ConfigError: names the key, its value and what is valid.
    """
    for key in settings:
        if key in FILLED_IN:
            raise ConfigError(f"{SECTION}.{key} is filled in: set {FILLED_IN[key]} instead")
    _refuse_auto(SECTION, settings)
    _validate(SECTION, DeepSpeedSettings, settings)
    if settings:
        name_accelerator()
    if "zero_optimization" in settings:
        _check_zero(f"{SECTION}.zero_optimization", settings["zero_optimization"])
    for section in settings.keys() & {"aio", "comms_logger", "flops_profiler"}:
        _validate(f"{SECTION}.{section}", _own_section(section), settings[section])


def _own_section(section: str) -> type[BaseModel]:
    """The keys of one of DeepSpeed's sections and their types, as DeepSpeed has them."""
    from deepspeed.comm.config import CommsLoggerConfig  # here, since DeepSpeed takes seconds to import
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT

    if section == "comms_logger":
        kept: type[BaseModel] = CommsLoggerConfig
        return kept
    defaults = AIO_DEFAULT_DICT if section == "aio" else vars(DeepSpeedFlopsProfilerConfig({}))
    fields: dict[str, Any] = {
        key: (str | None if default is None else type(default), default) for key, default in defaults.items()
    }
    made: type[BaseModel] = create_model(section, __config__=STRICT, **fields)
    return made


def _check_zero(section: str, zero: Mapping[str, Any]) -> None:
    if type(zero.get("stage")) is not int or zero["stage"] not in (1, 2, 3):
        raise ConfigError(f"{section}.stage={zero.get('stage')!r}: give 1, 2 or 3")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # imported here because it takes seconds

    _validate(section, DeepSpeedZeroConfig, zero)
    for key, field in DeepSpeedZeroConfig.model_fields.items():
        extra = field.json_schema_extra
        if key in zero and isinstance(extra, dict) and extra.get("deprecated"):
            raise ConfigError(f"{section}.{key} is deprecated in DeepSpeed: set {extra['new_param']} instead")
    if zero.get("compute_grad_norm") is False:
        raise ConfigError(f"{section}.compute_grad_norm=False: gradients are clipped by their norm; drop it")
    offload = zero.get("offload_param") or {}
    if offload.get("device") == "nvme" and not offload.get("nvme_path"):
        raise ConfigError(f"{section}.offload_param.device=nvme needs nvme_path: a folder on that device")
    _check_optimizer_within_reach(section, zero)
    for key, value in zero.items():
        if key.startswith("zero_quantized_") and value and not torch.cuda.is_available():
            raise ConfigError(f"{section}.{key}={value} needs a GPU, and this machine has none: drop it")
    if _device(zero, "offload_param") != "none" and zero["stage"] != 3:
        raise ConfigError(
            f"{section}.offload_param at stage {zero['stage']}: DeepSpeed ignores it there; set stage: 3, "
            "or drop offload_param"
        )


def _check_optimizer_within_reach(section: str, zero: Mapping[str, Any]) -> None:
    """Reject settings with which checkpoints would lack AdamW's state, which DeepSpeed keeps elsewhere."""
    offload = zero.get("offload_optimizer") or {}
    elsewhere: dict[str, Any] = {}
    if offload.get("device") == "nvme":
        elsewhere["offload_optimizer.device"] = "nvme"
    if offload.get("ratio", 1) < 1:
        elsewhere["offload_optimizer.ratio"] = offload["ratio"]
    if offload.get("super_offload"):
        elsewhere["offload_optimizer.super_offload"] = True
    if zero.get("zenflow"):
        elsewhere["zenflow"] = zero["zenflow"]
    for key, value in elsewhere.items():
        raise ConfigError(
            f"{section}.{key}={value}: checkpoints cannot hold the state of such an optimizer; drop the key, "
            "or write offload_optimizer: {device: cpu} (12 bytes of host memory for each adapter weight)"
        )


def _refuse_auto(section: str, settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            _refuse_auto(f"{section}.{key}", value)
        elif value == "auto":
            raise ConfigError(
                f"{section}.{key}=auto is filled in by transformers' Trainer, which is not used here: give a "
                "value, or drop the key for DeepSpeed's default"
            )


def _validate(section: str, model: type[BaseModel], settings: Mapping[str, Any]) -> None:
    """Validate with a pydantic model; the first error is raised as a ConfigError."""
    for key, value in settings.items():
        field = model.model_fields.get(key)
        if isinstance(value, bool) and field is not None and bool not in _types(field.annotation):
            raise ConfigError(f"{section}.{key}={value}: give a number, not true or false")
    try:
        model(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        keys = [str(key) for key in first["loc"]]
        where = ".".join([section, *keys])
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"{where} is unknown; {_likely(keys[-1], _known(model, keys[:-1]))}") from error
        value = f"{where}={first['input']!r}" if keys else where
        remedy = (
            f": write {keys[-1]}: {{device: cpu}}"
            if keys[-1:] in (["offload_param"], ["offload_optimizer"])
            else ""
        )
        raise ConfigError(f"{value}: {first['msg'].removeprefix('Assertion failed, ')}{remedy}") from error
    except TypeError as error:  # a key is not a text
        raise ConfigError(f"{section}: {error}") from error


def _types(annotation: Any) -> set[Any]:
    """A type, all types inside it, and those of the values that it lists."""
    return {annotation, type(annotation)}.union(*(_types(inner) for inner in get_args(annotation)))


def _known(model: type[BaseModel], path: Iterable[str]) -> list[str]:
    """The keys of a pydantic model, or of the nested model at the key path `path`."""
    for key in path:
        field = model.model_fields[key]
        model = next(kind for kind in (field.annotation, *get_args(field.annotation)) if _is_model(kind))
    return [field.alias or name for name, field in model.model_fields.items()]


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _likely(key: str, known: list[str]) -> str:
    likely = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {likely[0]}?" if likely else f"known: {', '.join(sorted(known))}"


def zero_stage(settings: Mapping[str, Any]) -> int:
    """ZeRO stage of `training.deepspeed`, 2 by default."""
    return settings.get("zero_optimization", {}).get("stage", 2)


def offloads_optimizer(settings: Mapping[str, Any]) -> bool:
    """Whether the optimizer state is offloaded to the CPU."""
    return _offloads(settings, "offload_optimizer")


def compiles_optimizer(settings: Mapping[str, Any]) -> bool:
    """Whether AdamW is DeepSpeed's for offloading, which is compiled at first use, instead of torch's."""
    return offloads_optimizer(settings) and settings.get("zero_force_ds_cpu_optimizer", True)


def offloads_weights(settings: Mapping[str, Any]) -> bool:
    """Whether the model's weights are offloaded to the CPU or a disk."""
    return _offloads(settings, "offload_param")


def _offloads(settings: Mapping[str, Any], what: str) -> bool:
    return _device(settings.get("zero_optimization", {}), what) != "none"


def _device(zero: Mapping[str, Any], what: str) -> str:
    return (zero.get(what) or {}).get("device", "none")


def check_quantization(training: TrainingConfig) -> None:
    """Raise a ConfigError if 4-bit quantization is not possible with these settings."""
    if training.quantization is None:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"training.quantization={training.quantization} needs bitsandbytes, which is not installed: "
            "pip install 'dparallel[quantization]', or leave training.quantization out"
        )
    if zero_stage(training.deepspeed) == 3:
        raise ConfigError(
            f"training.quantization={training.quantization} with ZeRO stage 3: it cannot partition 4-bit "
            "weights; use stage 2 (4-bit weights are small), or stage 3 without quantization"
        )


def check_rollouts(recipe: RecipeConfig, training: TrainingConfig) -> None:
    """Raise a ConfigError if a student cannot decode during such a training."""
    if recipe.rollouts is not None and zero_stage(training.deepspeed) == 3:
        raise ConfigError(
            "rollouts with ZeRO stage 3: its processes must run the same forward passes, and responses take "
            "different numbers of them; use stage 2 (with quantization: nf4 if memory is short), or drop "
            "rollouts"
        )


BUILD_STARTS_WITHIN = 60.0  # seconds between taking the lock and starting the compiler


def check_builds(settings: Mapping[str, Any]) -> None:
    """Raise a ConfigError if an interrupted build has left a lock, for which training would wait forever.

    The lock belongs to DeepSpeed's optimizer for offloading, which is compiled at first use.
    """
    if not compiles_optimizer(settings):
        return
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    for lock in [*Path(root).glob("cpu_adam/lock"), *Path(root).glob("*/cpu_adam/lock")]:
        age = time.time() - lock.stat().st_mtime
        if age > BUILD_STARTS_WITHIN and not _is_built_in(lock.parent):
            raise ConfigError(
                f"{lock} was left by a build that was killed {age / 60:.0f} minutes ago, and every process "
                "would wait for it for ever: delete it, and build once beforehand: "
                'python -c "from deepspeed.ops.op_builder.cpu import CPUAdamBuilder; CPUAdamBuilder().load()"'
            )


def _is_built_in(folder: Path) -> bool:
    """Whether the folder is the working folder of a running process, such as a compiler."""
    return any(process.info["cwd"] == str(folder.resolve()) for process in psutil.process_iter(["cwd"]))
