"""The attention pattern of a canvas that is decoded."""

import torch
from torch import Tensor

from dparallel.config.decoding import DecodingConfig
from dparallel.models.attention import block_levels


def attention_levels(decoding: DecodingConfig, prompt_length: Tensor, length: int) -> Tensor | None:
    """Attention pattern of `length` canvas positions, as `levels` (b, L); None for full attention."""
    if not decoding.looks_back:
        return None
    every = torch.arange(length, device=prompt_length.device)
    if decoding.mode == "autoregressive":
        return every.expand(len(prompt_length), length)
    return block_levels(every, prompt_length, decoding.block_length)
