"""What a config may ask of DeepSpeed and of quantization. Imports neither, so that checks stay fast."""

import difflib
import importlib.util
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

from dparallel.config.base import ConfigError
from dparallel.config.experiment import TrainingConfig

KEPT_CHECKPOINTS = 2
REDUCE_BUCKET_SIZE = 50_000_000  # elements; DeepSpeed's own 500 million are more than an adapter's gradients
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
KNOWN = {
    *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "aio"),
    *("communication_data_type", "data_types", "prescale_gradients", "gradient_predivide_factor"),
    *("comms_logger", "flops_profiler", "wall_clock_breakdown", "memory_breakdown", "dump_state"),
}
ZERO_KNOWN = {
    *("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "allgather_partitions"),
    *("use_multi_rank_bucket_allreduce", "allgather_bucket_size", "overlap_comm", "load_from_fp32_weights"),
    *("offload_param", "offload_optimizer", "sub_group_size", "round_robin_gradients"),
    *("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
    *("stage3_model_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance"),
    *("stage3_gather_16bit_weights_on_model_save", "stage3_module_granularity_threshold"),
    *("stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential"),
    *("ignore_unused_parameters", "zero_hpz_partition_size", "zero_quantized_weights"),
    *("zero_quantized_nontrainable_weights", "zero_quantized_gradients", "memory_efficient_linear"),
    *("log_trace_cache_warnings", "enable_sanity_checks"),
}


def check_deepspeed(settings: Mapping[str, Any]) -> None:
    """Refuse what DeepSpeed would ignore (it does not look at unknown keys) or what is filled in.

    Args:
        settings: `training.deepspeed`; nothing in it means ZeRO stage 2.

    Raises:
        ConfigError: a key that is filled in or unknown, or a ZeRO stage that is not 1, 2 or 3.
    """
    for key in settings:
        if key in FILLED_IN:
            raise ConfigError(f"training.deepspeed.{key} is filled in: set {FILLED_IN[key]} instead")
    _refuse_unknown("training.deepspeed", settings, KNOWN)
    if "zero_optimization" not in settings:
        return
    zero = settings["zero_optimization"]
    if not isinstance(zero, Mapping):
        raise ConfigError(
            f"training.deepspeed.zero_optimization={zero!r} is no mapping: "
            "write zero_optimization: {stage: 2}"
        )
    _refuse_unknown("training.deepspeed.zero_optimization", zero, ZERO_KNOWN)
    if zero.get("stage") not in (1, 2, 3):
        raise ConfigError(f"training.deepspeed.zero_optimization.stage={zero.get('stage')!r}: give 1, 2 or 3")


def zero_stage(settings: Mapping[str, Any]) -> int:
    """Of `training.deepspeed`; 2 unless told."""
    return settings.get("zero_optimization", {}).get("stage", 2)


def offloads_optimizer(settings: Mapping[str, Any]) -> bool:
    return _offloads(settings, "offload_optimizer")


def offloads_weights(settings: Mapping[str, Any]) -> bool:
    return _offloads(settings, "offload_param")


def _offloads(settings: Mapping[str, Any], what: str) -> bool:
    return settings.get("zero_optimization", {}).get(what, {}).get("device", "none") != "none"


def check_quantization(training: TrainingConfig) -> None:
    """Refuse 4-bit weights where they cannot be trained on, as a `ConfigError`."""
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


BUILD_STARTS_WITHIN = 60.0  # seconds after a build took its lock


def check_builds(settings: Mapping[str, Any]) -> None:
    """Refuse to wait for a build that nobody is doing: a killed one leaves its lock behind.

    Raises:
        ConfigError: naming the lock of the optimizer to be compiled for offloading.
    """
    if not offloads_optimizer(settings):
        return
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    for lock in [*Path(root).glob("cpu_adam/lock"), *Path(root).glob("*/cpu_adam/lock")]:
        age = time.time() - lock.stat().st_mtime
        if age > BUILD_STARTS_WITHIN and not _someone_works_in(lock.parent):
            raise ConfigError(
                f"{lock} was left by a build that was killed {age / 60:.0f} minutes ago, and every process "
                "would wait for it for ever: delete it, and build once beforehand: "
                'python -c "from deepspeed.ops.op_builder.cpu import CPUAdamBuilder; CPUAdamBuilder().load()"'
            )


def _someone_works_in(folder: Path) -> bool:
    """Whether a process stands in the folder, as compilers do."""
    return any(each.info["cwd"] == str(folder.resolve()) for each in psutil.process_iter(["cwd"]))


def _refuse_unknown(section: str, keys: Iterable[str], known: set[str]) -> None:
    for key in keys:
        if key not in known:
            likely = difflib.get_close_matches(str(key), known, n=1)
            remedy = f"did you mean {likely[0]}?" if likely else f"known: {', '.join(sorted(known))}"
            raise ConfigError(f"{section}.{key} is unknown; {remedy}")
