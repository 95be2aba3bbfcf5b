"""Block scheduling as pure functions: which blocks open, must advance, or are still recomputed.

Sequential decoding is the special case in which a block opens when the previous block is complete.
Legend: b rows, K blocks, n positions read.
"""

from functools import cache

import numpy as np


def at(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Select `values` (b, m) at `index` (b, n); returns (b, n). Faster than `take_along_axis`."""
    return values[np.arange(len(values))[:, None], index]


@cache
def tokens_needed(share: float, block_length: int) -> int:
    """The smallest number of committed tokens that is at least a fraction `share` of a block."""
    return next(count for count in range(block_length + 1) if count / block_length >= share)


def open_next(committed: np.ndarray, opened: np.ndarray, needed: int, may_open: np.ndarray) -> np.ndarray:
    """Whether each row opens its next block, (b,) bool.

    Args:
        committed: (b, K) committed tokens per block.
        opened: (b,) number of open blocks, at least 1.
        needed: committed tokens that the last open block must have.
        may_open: (b,) bool, whether the row may open further blocks.
    """
    last = committed[np.arange(len(opened)), opened - 1]
    return may_open & (opened < committed.shape[1]) & (last >= needed)


def overdue(block: np.ndarray, masked: np.ndarray, commit: np.ndarray) -> np.ndarray:
    """Masked positions of the first incomplete block, in rows where none of its tokens is committed.

    All blocks before it are complete, so this block must advance regardless of thresholds.

    Args:
        block: (b, n) block of each position read.
        masked, commit: (b, n) bool.

    Returns:
        (b, n) bool, all False in rows where that block advances.
    """
    none = np.iinfo(block.dtype).max
    first = np.where(masked, block, none).min(1, keepdims=True)
    inside = masked & (block == first)
    return inside & ~(inside & commit).any(1, keepdims=True)


def stalled(
    fully_active: np.ndarray, block: np.ndarray, masked: np.ndarray, commit: np.ndarray
) -> np.ndarray:
    """Masked positions of fully active blocks in which no token is committed, (b, n) bool.

    Args:
        fully_active: (b, K) bool.
        block: (b, n) block of each position read.
        masked, commit: (b, n) bool.
    """
    row, place = (masked & commit).nonzero()
    waits = fully_active.copy()
    waits[row, block[row, place]] = False
    return masked & at(waits, block)


def live(committed: np.ndarray, block_length: int, opened: np.ndarray, rounds_left: np.ndarray) -> np.ndarray:
    """Open blocks that still change: incomplete ones, and complete ones that have not settled; (b, K) bool.

    Args:
        rounds_left: (b, K) further forward passes that include a complete block.
    """
    is_open = np.arange(committed.shape[1]) < opened[:, None]
    return is_open & ((committed < block_length) | (rounds_left > 0))


def first_full(committed: np.ndarray, block_length: int) -> np.ndarray:
    """Complete blocks with only complete blocks before them, (b, K) bool; no later token changes them."""
    return np.logical_and.accumulate(committed == block_length, axis=1)


def from_first(blocks: np.ndarray) -> np.ndarray:
    """All blocks from the first of `blocks` (b, K) bool on."""
    return np.logical_or.accumulate(blocks, axis=1)


def places(chosen: np.ndarray, count: int) -> np.ndarray:
    """Ascending indices of the first `count` true entries of `chosen` (b, m); rows with fewer add others."""
    return np.argsort(~chosen, axis=1, kind="stable")[:, :count]


def best(score: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """The first position with the highest score within `candidates`, (b, n) bool; none without candidates."""
    winner = np.where(candidates, score, -np.inf).argmax(1)
    rows, chosen = np.arange(len(winner)), np.zeros_like(candidates)
    chosen[rows, winner] = candidates[rows, winner]
    return chosen


def best_of_each(score: np.ndarray, candidates: np.ndarray, block: np.ndarray) -> np.ndarray:
    """The first position with the highest score of each block, within `candidates`; (b, n) bool.

    Args:
        block: (b, n) block of each position.
    """
    chosen = np.zeros_like(candidates)
    for each in np.unique(block[candidates]):
        chosen |= best(score, candidates & (block == each))
    return chosen
