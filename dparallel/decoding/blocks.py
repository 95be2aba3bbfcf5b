"""Block scheduling as pure functions: which blocks open, must advance, or are still recomputed.

Sequential decoding is the special case in which a block opens when the previous block is complete.
Legend: b rows, K blocks, n positions read.
"""

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


def tokens_needed(share: float, block_length: int) -> int:
    """The smallest number of committed tokens that is at least a fraction `share` of a block."""
    return next(count for count in range(block_length + 1) if count / block_length >= share)


def open_next(committed: Tensor, opened: Tensor, needed: int, may_open: Tensor) -> Tensor:
    """Whether each row opens its next block, (b,) bool.

    Args:
        committed: (b, K) committed tokens per block.
        opened: (b,) number of open blocks, at least 1.
        needed: committed tokens that the last open block must have.
        may_open: (b,) bool, whether the row may open further blocks.
    """
    last = committed.gather(1, opened[:, None] - 1)[:, 0]
    return may_open & (opened < committed.shape[1]) & (last >= needed)


def overdue(block: Tensor, masked: Tensor, commit: Tensor) -> Tensor:
    """Masked positions of the first incomplete block, in rows where none of its tokens is committed.

    All blocks before it are complete, so this block must advance regardless of thresholds.

    Args:
        block: (b, n) block of each position read.
        masked, commit: (b, n) bool.

    Returns:
        (b, n) bool, all False in rows where that block advances.
    """
    none = torch.iinfo(block.dtype).max
    first = block.masked_fill(~masked, none).amin(1, keepdim=True)
    inside = masked & (block == first)
    return inside & ~(inside & commit).any(1, keepdim=True)


def stalled(fully_active: Tensor, block: Tensor, masked: Tensor, commit: Tensor) -> Tensor:
    """Masked positions of fully active blocks in which no token is committed, (b, n) bool.

    Args:
        fully_active: (b, K) bool.
        block: (b, n) block of each position read.
        masked, commit: (b, n) bool.
    """
    # Counted, since CUDA has no scatter_reduce of bool.
    commits = torch.zeros_like(fully_active, dtype=torch.long).scatter_add(1, block, (masked & commit).long())
    return masked & (fully_active & (commits == 0)).gather(1, block)


def live(committed: Tensor, block_length: int, opened: Tensor, rounds_left: Tensor) -> Tensor:
    """Open blocks that still change: incomplete ones, and complete ones that have not settled; (b, K) bool.

    Args:
        rounds_left: (b, K) further forward passes that include a complete block.
    """
    is_open = torch.arange(committed.shape[1], device=committed.device) < opened[:, None]
    return is_open & ((committed < block_length) | (rounds_left > 0))


def first_full(committed: Tensor, block_length: int) -> Tensor:
    """Complete blocks with only complete blocks before them, (b, K) bool; no later token changes them."""
    return (committed == block_length).long().cummin(1).values.bool()


def from_first(blocks: Tensor) -> Tensor:
    """All blocks from the first of `blocks` (b, K) bool on."""
    return blocks.cummax(1).values


def places(chosen: Tensor, count: int) -> Tensor:
    """Ascending indices of the first `count` true entries of `chosen` (b, m); rows with fewer add others."""
    size = chosen.shape[1]
    order = torch.arange(size, 0, -1, device=chosen.device)
    return (order + size * chosen).topk(count).indices  # distinct keys: the same result on every device
