"""End tokens in responses: which tokens end one, and what is behind the first of them."""

from collections.abc import Sequence

import numpy as np


def is_end(tokens: np.ndarray, end_token_ids: Sequence[int]) -> np.ndarray:
    """Which `tokens` end a response, bool of the same shape."""
    ends = tokens == (end_token_ids[0] if end_token_ids else -1)
    for token_id in end_token_ids[1:]:
        ends |= tokens == token_id
    return ends


def behind_first(ends: np.ndarray) -> np.ndarray:
    """Positions behind the first of the end tokens of each row, `ends` (b, G) bool; of the same shape."""
    return ends.cumsum(1) - ends > 0
