"""Which blocks of a response open, must advance, or are still recomputed: pure functions.

Sequential decoding is the case in which a block opens when the one before is full.
Legend: b rows, K blocks, n positions read.
"""

import torch
from torch import Tensor

from dparallel.config.decoding import DecodingConfig
from dparallel.models.attention import block_levels


def seen_levels(decoding: DecodingConfig, prompt_length: Tensor, length: int) -> Tensor | None:
    """Whom each of `length` canvas positions sees, as the model's `levels` (b, L); None: everybody."""
    if not decoding.looks_back:
        return None
    every = torch.arange(length, device=prompt_length.device)
    if decoding.mode == "autoregressive":
        return every.expand(len(prompt_length), length)
    return block_levels(every, prompt_length, decoding.block_length)


def tokens_needed(share: float, block_length: int) -> int:
    """The smallest number of committed tokens whose share of a block is at least `share`."""
    return next(count for count in range(block_length + 1) if count / block_length >= share)


def open_next(committed: Tensor, opened: Tensor, needed: int, may_open: Tensor) -> Tensor:
    """Whether each row opens its next block, (b,) bool.

    Args:
        committed: (b, K) tokens committed per block.
        opened: (b,) blocks open so far, at least 1.
        needed: tokens that the last opened block must have.
        may_open: (b,) bool.
    """
    last = committed.gather(1, opened[:, None] - 1)[:, 0]
    return may_open & (opened < committed.shape[1]) & (last >= needed)


def overdue(block: Tensor, masked: Tensor, commit: Tensor) -> Tensor:
    """Masked positions of the first block that has any, in rows where nothing of it is committed.

    That block is always fully active, whatever share makes a block so: all before it are full.

    Args:
        block: (b, n) the block of each position read.
        masked, commit: (b, n) bool.

    Returns:
        (b, n) bool, empty where that block has advanced.
    """
    none = torch.iinfo(block.dtype).max
    first = block.masked_fill(~masked, none).amin(1, keepdim=True)
    inside = masked & (block == first)
    return inside & ~(inside & commit).any(1, keepdim=True)


def stalled(fully_active: Tensor, block: Tensor, masked: Tensor, commit: Tensor) -> Tensor:
    """Masked positions of fully active blocks of which nothing is committed, (b, n) bool.

    Args:
        fully_active: (b, K) bool.
        block: (b, n) the block of each position read.
        masked, commit: (b, n) bool.
    """
    advances = torch.zeros_like(fully_active).scatter_reduce(1, block, masked & commit, "amax")  # (b, K)
    return masked & (fully_active & ~advances).gather(1, block)


def live(committed: Tensor, block_length: int, opened: Tensor, rounds_left: Tensor) -> Tensor:
    """Open blocks that still change: with masks, or full but not settled yet, (b, K) bool.

    Args:
        rounds_left: (b, K) forwards that a full block still takes part in.
    """
    is_open = torch.arange(committed.shape[1], device=committed.device) < opened[:, None]
    return is_open & ((committed < block_length) | (rounds_left > 0))


def first_full(committed: Tensor, block_length: int) -> Tensor:
    """Full blocks before which all are full, (b, K) bool: what no later token can change."""
    return (committed == block_length).long().cummin(1).values.bool()


def from_first(blocks: Tensor) -> Tensor:
    """Every block from the first of `blocks` (b, K) bool on."""
    return blocks.cummax(1).values


def places(chosen: Tensor, count: int) -> Tensor:
    """Where the first `count` of `chosen` (b, m) bool are, ascending; others follow in rows with fewer."""
    size = chosen.shape[1]
    order = torch.arange(size, 0, -1, device=chosen.device)
    return (order + size * chosen).topk(count).indices  # distinct keys: one answer on every device
