"""The distillation loss, computed in float32 at the positions that count in the loss.

Only the model's own logits are kept for the backward pass. Intermediate float32 values are recomputed in the
backward pass, in chunks of positions, to save memory with large vocabularies.

Legend: N positions read over all views of a batch, V vocabulary, R views.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 2**26  # size of a chunk of float32 logits


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy against the trajectory's tokens.

    Args:
        logits: (N, V) at the positions read.
        targets: int64 (N,), the trajectory's tokens at these positions.

    Returns:
        Float32 (N,).
    """

    def values(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets, reduction="none")

    return _in_chunks(values, logits, targets)


def soft_cross_entropy(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy of `logits` (N, V) against the teacher's distribution; returns float32 (N,)."""

    def values(logits: Tensor, teacher_logits: Tensor) -> Tensor:
        probability = F.softmax(teacher_logits.float(), dim=-1)
        return -(probability * F.log_softmax(logits.float(), dim=-1)).sum(dim=-1)

    return _in_chunks(values, logits, teacher_logits)


def divergence(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) from `logits` (N, V) of both; returns float32 (N,), in nats.

    The gradient is that of `soft_cross_entropy`, and the value is 0 where the distributions are equal.
    """

    def values(logits: Tensor, teacher_logits: Tensor) -> Tensor:
        probability = F.softmax(teacher_logits.float(), dim=-1)
        return F.kl_div(F.log_softmax(logits.float(), dim=-1), probability, reduction="none").sum(dim=-1)

    return _in_chunks(values, logits, teacher_logits)


def certainty(
    logits: Tensor,
    targets: Tensor,
    view: Tensor,
    views: int,
    temperature: float,
    candidates: Tensor | None = None,
) -> Tensor:
    """Mean entropy of softmax(logits / temperature) over correctly predicted positions, for each view.

    Minimising it makes the student more certain of its correct predictions.

    Args:
        logits, targets: as in `cross_entropy`.
        view: int64 (N,), the view of each position.
        views: R.
        candidates: bool (N,), positions to include; by default all.

    Returns:
        Float32 (R,), in nats; 0 for views without a correctly predicted position.
    """
    right = logits.argmax(dim=-1) == targets  # (N,)
    if candidates is not None:
        right &= candidates

    def values(logits: Tensor) -> Tensor:
        return entropy(logits.float() / temperature)

    return _mean_by_view(_in_chunks(values, logits[right]), view[right], views)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats, over the whole vocabulary: (N, V) -> float32 (N,)."""
    log_probability = F.log_softmax(logits.float(), dim=-1)
    return -(log_probability.exp() * log_probability).sum(dim=-1)


def _in_chunks(values: Callable[..., Tensor], logits: Tensor, *others: Tensor) -> Tensor:
    """`values(logits (N, V), *others (N, ...))` (N,), computed in chunks that backward recomputes."""
    positions = max(1, CHUNK_BYTES // (torch.float32.itemsize * logits.shape[-1]))
    chunks = zip(*(part.split(positions) for part in (logits, *others)), strict=True)
    return torch.cat(
        [checkpoint(values, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    )


def _mean_by_view(values: Tensor, view: Tensor, views: int) -> Tensor:
    sums = values.new_zeros(views).index_add(0, view, values)
    counts = torch.bincount(view, minlength=views).clamp(min=1)
    return sums / counts
