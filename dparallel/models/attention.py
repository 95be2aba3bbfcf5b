"""Who sees whom on a canvas, as levels: a position sees those of its own level and below.

Legend: B rows, L canvas length.
"""

from torch import Tensor


def block_levels(positions: Tensor, prompt_length: Tensor, block_length: int) -> Tensor:
    """Block-causal attention: the prompt sees itself; a block sees the prompt, earlier blocks and itself.

    Args:
        positions: int64 (L,) or (B, L) on the canvas.
        prompt_length: int64 (B,).

    Returns:
        int64 (B, L): 0 in the prompt, k in the k-th block of `block_length` positions (from 1). What
        follows the response is in blocks of its own, which nothing before them sees.
    """
    offsets = positions - prompt_length[:, None]
    return (offsets.div(block_length, rounding_mode="floor") + 1).clamp(min=0)
