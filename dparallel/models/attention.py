"""Attention patterns as levels: a position attends to the positions of its own level and of lower levels.

Legend: B rows, L canvas length.
"""

from torch import Tensor


def block_levels(positions: Tensor, prompt_length: Tensor, block_length: int) -> Tensor:
    """Levels of block-causal attention.

    The prompt attends to itself; a block attends to the prompt, to earlier blocks and to itself.

    Args:
        positions: int64 (L,) or (B, L), positions on the canvas.
        prompt_length: int64 (B,).
        block_length: positions per block.

    Returns:
        int64 (B, L): 0 in the prompt, k in the k-th block of `block_length` positions (from 1). Positions
        after the response continue the numbering, so that nothing before them attends to them.
    """
    offsets = positions - prompt_length[:, None]
    return (offsets.div(block_length, rounding_mode="floor") + 1).clamp(min=0)
