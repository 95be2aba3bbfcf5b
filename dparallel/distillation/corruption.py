"""Draw the masked response positions of a training row, and those that count in the loss.

Pure functions of a row and its own random generator, independent of the batch, of the number of processes and
of resumption.

Legend: G response positions, K blocks, n positions of a region.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class View(NamedTuple):
    """A corrupted response: the loss is taken at `read`, weighted by `weight`.

    `read` is a subset of `masked`, except in recipes with `own_tokens`.
    """

    masked: np.ndarray  # bool (G,)
    read: np.ndarray  # bool (G,)
    weight: np.ndarray  # float32 (G,), relative to other positions of the train step; 0 where not read
    near: np.ndarray | None = None  # bool (G,), of `masked`; None if the recipe does not tell near from far
    filled: bool | None = (
        None  # whether the student's own predictions fill the masked positions that are read
    )
    end: int | None = None  # response positions of the canvas; None for all


def draw_block(
    response_ids: np.ndarray,
    block_length: int,
    end_token_ids: Sequence[int],
    eos_region_ratio: float,
    rng: np.random.Generator,
) -> slice:
    """Draw a block of the response; returns the slice of its positions.

    A block entirely after the first end-of-sequence token is padding, and is drawn `eos_region_ratio` times
    as often as a block with content. G must be a multiple of `block_length`.
    """
    starts = np.arange(0, len(response_ids), block_length)  # (K,)
    content = starts < content_length(response_ids, end_token_ids)
    weights = np.where(content, 1.0, eos_region_ratio)
    start = int(starts[rng.choice(len(starts), p=weights / weights.sum())])
    return slice(start, start + block_length)


def content_length(response_ids: np.ndarray, end_token_ids: Sequence[int]) -> int:
    """Number of tokens including the first end-of-sequence token; all tokens if there is none."""
    ends = np.flatnonzero(np.isin(response_ids, end_token_ids))
    return int(ends[0]) + 1 if len(ends) else len(response_ids)


def draw_unread(
    response_ids: np.ndarray,
    block_length: int,
    end_token_ids: Sequence[int],
    eos_region_ratio: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draw the positions that a loss over the whole response excludes, bool (G,).

    A block entirely after the first end-of-sequence token is included with probability `eos_region_ratio`.
    """
    starts = np.arange(0, len(response_ids), block_length)  # (K,)
    padding = starts >= content_length(response_ids, end_token_ids)
    return np.repeat(padding & (rng.random(len(starts)) >= eos_region_ratio), block_length)


def draw_group(
    response_ids: np.ndarray,
    block_length: int,
    most_blocks: int,
    end_token_ids: Sequence[int],
    eos_region_ratio: float,
    rng: np.random.Generator,
) -> slice:
    """Draw a group of 2 to `most_blocks` blocks, fewer at the end of the response (MultiTF).

    Its first block is drawn like that of `draw_block`, so that every block occurs at every place of a group
    except the first block of the response, which nothing can precede.
    """
    first = draw_block(response_ids, block_length, end_token_ids, eos_region_ratio, rng)
    blocks = int(rng.integers(2, most_blocks, endpoint=True))
    return slice(first.start, min(first.start + blocks * block_length, len(response_ids)))


def draw_ratio(low: float, high: float, rng: np.random.Generator) -> float:
    """Draw a mask ratio uniformly from `low` to `high`."""
    return low if low == high else rng.uniform(low, high)


def monotone_ratios(blocks: int, low: float, high: float, rng: np.random.Generator) -> np.ndarray:
    """Draw a mask ratio per block, (K,), in ascending order (D2F).

    The first is drawn from `low` to `high`; each following one adds U(0, 1) (high - first) / (K - 1).
    """
    first = draw_ratio(low, high, rng)
    rises = rng.random(blocks - 1) * (high - first) / max(1, blocks - 1)
    return np.minimum(first + np.cumsum([0.0, *rises]), 1.0)


def chained_ratios(
    blocks: int, low: tuple[float, float], high: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """Draw a mask ratio per block of a group, (K,), in ascending order (MultiTF).

    With a from `low` and b from `high`, the first is drawn from [U(a, b), b], and each following one from the
    range of the previous one to b.
    """
    bottom, top = draw_ratio(*low, rng), draw_ratio(*high, rng)
    bottom = draw_ratio(bottom, top, rng)
    ratios = []
    for _ in range(blocks):
        bottom = draw_ratio(bottom, top, rng)
        ratios.append(bottom)
    return np.array(ratios)


def mask_counts(mask_ratio: np.ndarray, block_length: int, rng: np.random.Generator) -> np.ndarray:
    """Mask exactly int(p n) positions of each block of n = `block_length`, drawn uniformly. Bool (K n,).

    Args:
        mask_ratio: (K,) p of each block.
    """
    order = rng.random((len(mask_ratio), block_length)).argsort(axis=1).argsort(axis=1)  # ranks
    return (order < (mask_ratio * block_length).astype(int)[:, None]).ravel()


def mask_at_random(mask_ratio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mask each position with its own probability, `mask_ratio` (n,); possibly none. Bool (n,)."""
    return rng.random(len(mask_ratio)) < mask_ratio


def mask_by_trajectory(commit_step: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The positions not yet committed at a uniformly drawn step of the teacher's trajectory. Bool (n,).

    Args:
        commit_step: (n,) step at which the teacher committed each position of the region.
    """
    return commit_step >= rng.choice(np.unique(commit_step))


def mask_from_point(commit_step: np.ndarray, mask_ratio: float) -> np.ndarray:
    """The positions not yet committed when the teacher had committed 1 - `mask_ratio`. Bool (n,).

    The ratio is rounded to whole positions. At least the positions of the last step are masked.
    """
    kept = round((1 - mask_ratio) * len(commit_step))
    last_kept = np.sort(commit_step)[kept - 1] if kept else -1
    return commit_step >= min(last_kept + 1, commit_step.max())


def near_tokens(commit_step: np.ndarray, masked: np.ndarray, delta: int) -> np.ndarray:
    """The masked positions that the teacher committed in the next `delta` forward passes. Bool (n,).

    Args:
        commit_step: (n,) steps at which the teacher committed the positions of the region.
        masked: bool (n,), a canvas of the trajectory, whose next step commits a position.
    """
    return masked & (commit_step < commit_step[masked].min() + delta)


def view(
    chosen: np.ndarray,
    region: slice,
    gen_length: int,
    ratio: np.ndarray | None = None,
    unread: np.ndarray | None = None,
    near: np.ndarray | None = None,
    given_too: bool = False,
) -> View:
    """Mask `chosen` (n,) in the region and everything after the region; the loss is taken at `chosen`.

    Args:
        ratio: (n,) probability of being chosen, for weighting by its inverse; by default all positions have
            equal weights with sum 1.
        unread: bool (n,), positions excluded from the loss.
        near: bool (n,), near positions; their weights have sum 1, and those of the others too.
        given_too: take the loss at all positions of the region, also where they are not masked.
    """
    masked = np.zeros(gen_length, dtype=bool)
    masked[region] = chosen
    read, weight = masked.copy(), np.zeros(gen_length, dtype=np.float32)
    masked[region.stop :] = True
    if given_too:
        read[region] = True
    if unread is not None:
        read[region] &= ~unread
    if near is not None:
        its, near = near, np.zeros(gen_length, dtype=bool)
        near[region] = its
    if ratio is not None:
        weight[read] = 1 / ratio[read[region]]
    else:
        for part in (read,) if near is None else (read & near, read & ~near):
            weight[part] = 1 / max(1, part.sum())
    return View(masked, read, weight, near)
