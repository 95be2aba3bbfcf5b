"""Random numbers as a pure function of where they are used.

The state of a generator would depend on a row's place in the batch and on the device; a hash of (row seed,
forward pass, position, token) does not.
"""

import torch
from torch import Tensor

_ODD = (-7046029254386353131, -4658895280553007687, -7723592293110705685)  # constants of SplitMix64


def uniform(row_seed: Tensor, denoise_step: Tensor, position: Tensor, vocabulary: int) -> Tensor:
    """Random numbers in (0, 1), float32 (B, l, vocabulary), for `position` (B, l) at `denoise_step` (B,)."""
    token = torch.arange(vocabulary, device=position.device)
    state = _mix(row_seed + _ODD[0] * (denoise_step + 1))[:, None]
    state = _mix(state + _ODD[0] * (position + 1))[..., None]
    state = _mix(state + _ODD[0] * (token + 1))
    return ((_shift(state, 41) + 0.5) / 2**23).float()  # 23 bits: exact in float32, never 0 or 1


def _mix(value: Tensor) -> Tensor:
    """SplitMix64's finalizer, in int64 with overflow."""
    value = (value ^ _shift(value, 30)) * _ODD[1]
    value = (value ^ _shift(value, 27)) * _ODD[2]
    return value ^ _shift(value, 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's shift is arithmetic)."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
