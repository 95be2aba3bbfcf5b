"""Devices and dtypes of models, and models without weights."""

import os

import torch

from dparallel.config.base import UserError
from dparallel.models.backbone import DiffusionConfig, DiffusionTransformer

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def name_accelerator() -> None:
    """Tell DeepSpeed that this machine has no GPU, if so; otherwise it guesses and warns.

    To be called before DeepSpeed is imported, which transformers also does to save a model.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def find_device(device: str | torch.device | None) -> torch.device:
    """Resolve a device and check that it is usable; the default is a GPU if there is one, else the CPU.

    Raises:
        UserError: the device is not available, or is "meta", which has no data.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    usable = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    try:
        found = torch.device(device)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"device={str(device)!r} cannot be used here ({reason}); give one of {', '.join(usable)}"
        ) from error
    if found.type == "meta":
        raise UserError(
            f"device='meta' has no data, so a model cannot be loaded to it: give one of {', '.join(usable)}"
        )
    return torch.device("cpu") if found.type == "cpu" else found  # safetensors knows no "cpu:0"


def find_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Resolve a dtype or its name; None and "auto" return None, which means the checkpoint's dtypes.

    Raises:
        UserError: the dtype is unknown or not suitable for models.
    """
    if dtype is None or dtype == "auto":
        return None
    found = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise UserError(f"dtype={dtype!r} is not known; give one of {', '.join(DTYPES)}, or auto")
    return found


def empty_model(config: DiffusionConfig) -> DiffusionTransformer:
    """The model on the meta device: modules and shapes without data."""
    with torch.device("meta"):
        return DiffusionTransformer(config)
