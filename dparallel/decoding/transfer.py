"""Move the small arrays of a forward pass between host and device, each way with one copy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dparallel.decoding.denoise import Inputs, Outcome

TYPES = {torch.int64: np.int64, torch.float32: np.float32, torch.float64: np.float64, torch.bool: np.bool_}


def to_device(inputs: Inputs[np.ndarray], device: torch.device) -> Inputs[Tensor]:
    """The arrays as tensors; on a GPU as views of one copy, which is not waited for."""
    if device.type == "cpu":
        return each_of(inputs, torch.from_numpy)
    arrays = [array for array in inputs if array is not None]
    flat = torch.from_numpy(np.concatenate([array.ravel().astype(np.int64) for array in arrays]))
    if device.type == "cuda":
        flat = flat.pin_memory()
    parts = iter(flat.to(device, non_blocking=True).split([array.size for array in arrays]))
    return each_of(inputs, lambda array: _shaped(next(parts), array))


def _shaped(part: Tensor, array: np.ndarray) -> Tensor:
    shaped = part.view(array.shape)
    return shaped.bool() if array.dtype == np.bool_ else shaped


def to_host(outcome: Outcome[Tensor], rows: int) -> Outcome[np.ndarray]:
    """The first `rows` rows of the tensors as arrays; waits for the device."""
    if outcome.token.device.type == "cpu":
        return each_of(outcome, lambda column: column.numpy()[:rows])
    given = [column for column in outcome if column is not None]
    # float64 holds the bits of all of them: token ids, float32 and float64 numbers, and bool.
    copies = iter(torch.stack([column[:rows].double() for column in given]).cpu().numpy())
    return each_of(outcome, lambda column: next(copies).astype(TYPES[column.dtype]))


def each_of(parts: Any, change: Callable[[Any], Any]) -> Any:
    """The parts of `Inputs` or an `Outcome`, each changed; what is None remains so."""
    return type(parts)(*(None if part is None else change(part) for part in parts))
