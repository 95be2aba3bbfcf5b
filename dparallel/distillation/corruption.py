"""Which response positions one training row masks, and which of those its loss reads.

Pure functions over one row: a row's draw depends on its own generator alone, never on its batch
mates, the number of processes or where a run was resumed.

Legend: G response positions, K blocks, n positions of a region.
"""

from typing import NamedTuple

import numpy as np


class View(NamedTuple):
    """One canvas made from a row: `read` is the part of `masked` that the loss looks at, by `weight`."""

    masked: np.ndarray  # bool (G,)
    read: np.ndarray  # bool (G,)
    weight: np.ndarray  # float32 (G,), relative to the other positions of a train step; 0 where not read


def draw_block(
    response_ids: np.ndarray,
    block_length: int,
    eos_token_id: int,
    eos_region_ratio: float,
    rng: np.random.Generator,
) -> slice:
    """One block of the response, as a slice of its positions.

    A block wholly after the first end-of-text token is padding: it is drawn `eos_region_ratio`
    times as often as a block with content. G must be a multiple of `block_length`.
    """
    starts = np.arange(0, len(response_ids), block_length)  # (K,)
    content = starts < content_length(response_ids, eos_token_id)
    weights = np.where(content, 1.0, eos_region_ratio)
    start = int(starts[rng.choice(len(starts), p=weights / weights.sum())])
    return slice(start, start + block_length)


def content_length(response_ids: np.ndarray, eos_token_id: int) -> int:
    """Tokens up to and with the first end-of-text token; all of them where there is none."""
    ends = np.flatnonzero(response_ids == eos_token_id)
    return int(ends[0]) + 1 if len(ends) else len(response_ids)


def draw_unread(
    response_ids: np.ndarray,
    block_length: int,
    eos_token_id: int,
    eos_region_ratio: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Positions that a loss over the whole response leaves out, bool (G,).

    Each block wholly after the first end-of-text token is read with probability `eos_region_ratio`.
    """
    starts = np.arange(0, len(response_ids), block_length)  # (K,)
    padding = starts >= content_length(response_ids, eos_token_id)
    return np.repeat(padding & (rng.random(len(starts)) >= eos_region_ratio), block_length)


def draw_ratio(low: float, high: float, rng: np.random.Generator) -> float:
    return low if low == high else rng.uniform(low, high)


def monotone_ratios(blocks: int, low: float, high: float, rng: np.random.Generator) -> np.ndarray:
    """One mask ratio for each block, (K,), none below the one before (D2F).

    The first is drawn from `low` to `high`; each next adds U(0, 1) (high - first) / (K - 1).
    """
    first = draw_ratio(low, high, rng)
    rises = rng.random(blocks - 1) * (high - first) / max(1, blocks - 1)
    return np.minimum(first + np.cumsum([0.0, *rises]), 1.0)


def mask_at_random(mask_ratio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each position with its own probability, (n,); possibly none. Bool (n,)."""
    return rng.random(len(mask_ratio)) < mask_ratio


def mask_by_trajectory(commit_step: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What the teacher had yet to commit at one of its own steps, each equally likely. Bool (n,).

    Args:
        commit_step: (n,) the step at which it fixed each position of the region.
    """
    return commit_step >= rng.choice(np.unique(commit_step))


def mask_from_point(commit_step: np.ndarray, mask_ratio: float) -> np.ndarray:
    """What the teacher had yet to commit after the step at which 1 - `mask_ratio` was committed. Bool (n,).

    That share is rounded to whole positions. At least what its last step committed is masked.
    """
    kept = round((1 - mask_ratio) * len(commit_step))
    last_kept = np.sort(commit_step)[kept - 1] if kept else -1
    return commit_step >= min(last_kept + 1, commit_step.max())


def view(
    chosen: np.ndarray,
    region: slice,
    gen_length: int,
    ratio: np.ndarray | None = None,
    unread: np.ndarray | None = None,
) -> View:
    """Mask `chosen` (n,) inside the region and everything after it; read only `chosen`.

    Args:
        ratio: (n,) with which probability each was chosen, to weigh by its inverse; else all positions
            read weigh the same, 1 in sum.
        unread: bool (n,), what is left out of the loss.
    """
    read, weight = np.zeros(gen_length, dtype=bool), np.zeros(gen_length, dtype=np.float32)
    read[region] = chosen
    masked = read.copy()
    masked[region.stop :] = True
    if unread is not None:
        read[region] &= ~unread
    if ratio is None:
        weight[read] = 1 / max(1, read.sum())
    else:
        weight[read] = 1 / ratio[read[region]]
    return View(masked, read, weight)
