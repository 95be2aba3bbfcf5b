"""Self-revising decoding (DMax): committed tokens of the active block are predicted again until it is final.

Legend: b rows, G `gen_length`, K blocks of l positions, m positions of the input, n positions read, D hidden
size.
"""

import numpy as np
import torch
from torch import Tensor

from dparallel.models.backbone import at_least_float32

# Probabilities count in steps of 1 / LEVELS, about as fine as bf16. Rounding errors, which depend on the
# shape of a batch, would otherwise grow from one forward pass to the next.
LEVELS = 128


def changed(
    token: np.ndarray, read: np.ndarray, masked: np.ndarray, fixed: np.ndarray, held: np.ndarray
) -> np.ndarray:
    """Positions whose token is new, (b, n) bool: masked ones that are committed, and others predicted anew.

    Args:
        token: (b, n) predictions.
        read, masked, fixed: (b, n) bool; positions that are not read only fill up the shape.
        held: (b, n) the tokens before this forward pass.
    """
    return fixed | (read & ~masked & (token != held))


def settled(sure: np.ndarray, read: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Whether a block without masks needs no further forward pass, (b,) bool.

    The model is `sure` of all its tokens, or none of them is `new`; both (b, n) bool.
    """
    return (sure | ~read).all(1) | ~new.any(1)


def final(commit_step: np.ndarray, rounds_left: np.ndarray) -> np.ndarray:
    """Positions that no further forward pass changes, (b, G) bool: of complete blocks without rounds left.

    Args:
        commit_step: (b, G), negative while masked.
        rounds_left: (b, K) further forward passes that may revise the block once it is complete.
    """
    blocks = (commit_step >= 0).reshape(*rounds_left.shape, -1)  # (b, K, l)
    return (blocks & (blocks.all(2) & (rounds_left == 0))[..., None]).reshape(commit_step.shape)


def final_count(commit_step: np.ndarray, rounds_left: np.ndarray, revises: bool) -> np.ndarray:
    """Number of tokens at the front of a response that no further forward pass changes, (b,).

    Args:
        commit_step, rounds_left: (b, G) and (b, K), see `final`.
        revises: whether committed tokens may change.
    """
    fixed = final(commit_step, rounds_left) if revises else commit_step >= 0
    return np.logical_and.accumulate(fixed, axis=1).sum(1)


def soft_embeddings(own: Tensor, mask: Tensor, probability: Tensor) -> Tensor:
    """The embedding between a token's and the mask's for a token that the model is sure of by `probability`.

    e = p·own + (1 - p)·mask, scaled to the norm p·‖own‖ + (1 - p)·‖mask‖; computed in float32 or wider.

    Args:
        own: (..., D) embeddings of the tokens.
        mask: (D,) embedding of the mask.
        probability: (...).
    """
    wide, mask, p = at_least_float32(own), at_least_float32(mask), probability[..., None]
    mixed = p * wide + (1 - p) * mask
    norm = p * wide.norm(dim=-1, keepdim=True) + (1 - p) * mask.norm()
    length = mixed.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(mixed.dtype).tiny)
    return (mixed * (norm / length)).to(own.dtype)


def soft_inputs(
    embedding: torch.nn.Module,
    mask_token_id: int,
    input_ids: Tensor,
    places: Tensor,
    tokens: Tensor,
    committed: Tensor,
    probability: Tensor,
) -> Tensor:
    """Embeddings of `input_ids` (b, m), soft at the committed positions of the active block; (b, m, D).

    Args:
        places: (b, m) where in the block each input is, from 0 to n - 1; other numbers are outside. Inputs
            that occur twice are alike.
        tokens, committed, probability: (b, n) of the block: its tokens, whether they are committed, and their
            probabilities by the last forward pass, which are rounded to multiples of 1 / `LEVELS`.
    """
    probability = (probability * LEVELS).round() / LEVELS
    mask = embedding(torch.full_like(input_ids[:1, :1], mask_token_id))[0, 0]
    own, inputs = embedding(tokens), embedding(input_ids)
    block = torch.where(committed[..., None], soft_embeddings(own, mask, probability), own)  # (b, n, D)
    inside = (places >= 0) & (places < tokens.shape[1])
    at = places.where(inside, 0)[..., None].expand(-1, -1, inputs.shape[-1])
    return torch.where(inside[..., None], block.gather(1, at), inputs)
