"""Where a model's numbers are put, in which dtype, and a model without any."""

import torch

from dparallel.config.base import UserError
from dparallel.models.backbone import DiffusionConfig, DiffusionTransformer

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def find_device(device: str | torch.device | None) -> torch.device:
    """The device, shown to be usable here; None: a GPU if there is one, else the CPU.

    Raises:
        UserError: there is no such device here, or it holds no numbers.
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
            "device='meta' holds shapes and no numbers, so a model cannot be loaded to it: give one of "
            f"{', '.join(usable)}"
        )
    return found


def find_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype, by its name or itself; None and "auto" leave it to the checkpoint, as None.

    Raises:
        UserError: one that models cannot be computed in, or unknown.
    """
    if dtype is None or dtype == "auto":
        return None
    found = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise UserError(f"dtype={dtype!r} is not known; give one of {', '.join(DTYPES)}, or auto")
    return found


def empty_model(config: DiffusionConfig) -> DiffusionTransformer:
    """The model's modules and shapes; no numbers."""
    with torch.device("meta"):
        return DiffusionTransformer(config)
