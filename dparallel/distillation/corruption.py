"""Which response positions one training row masks, and which of those its loss reads.

Pure functions over one row: a row's draw depends on its own generator alone, never on its batch
mates, the number of processes or where a run was resumed.

Legend: G response positions, K blocks, n positions of a region.
"""

from typing import NamedTuple

import numpy as np


class View(NamedTuple):
    """One canvas made from a row: `read` is the part of `masked` that the loss looks at."""

    masked: np.ndarray  # bool (G,)
    read: np.ndarray  # bool (G,)


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


def mask_at_random(length: int, mask_ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Each of `length` positions with probability `mask_ratio`; possibly none. Bool (n,)."""
    return rng.random(length) < mask_ratio


def mask_by_trajectory(commit_step: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What the teacher had yet to commit at one of its own steps, each equally likely. Bool (n,).

    Args:
        commit_step: (n,) the step at which it fixed each position of the region.
    """
    return commit_step >= rng.choice(np.unique(commit_step))


def view(chosen: np.ndarray, region: slice, gen_length: int) -> View:
    """Mask `chosen` (n,) inside the region and everything after it; read only `chosen`."""
    read = np.zeros(gen_length, dtype=bool)
    read[region] = chosen
    masked = read.copy()
    masked[region.stop :] = True
    return View(masked, read)
