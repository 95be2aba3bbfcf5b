"""Commit rules: pure functions from one forward's predictions to the positions it fixes.

To add a rule, write one function here and one line in `RULES`, and name it in `config.Rule`.
Legend: B rows, l positions of the active block, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Prediction(NamedTuple):
    """What one forward says about a block, each (B, l)."""

    token: Tensor
    probability: Tensor  # of `token`, float32
    entropy: Tensor  # nats, full vocabulary, no temperature, float32


class BlockStep(NamedTuple):
    """The rule's setting, and where the block stands."""

    threshold: float | None
    steps_per_block: int | None
    denoise_step: Tensor  # (B,) forwards the block has had


CommitRule = Callable[[Prediction, Tensor, BlockStep], Tensor]


def predict(
    logits: Tensor,
    mask_token_id: int,
    temperature: float = 0.0,
    top_p: float | None = None,
    uniform: Tensor | None = None,
) -> Prediction:
    """Token, probability and entropy of `logits` (B, l, V), in float32.

    The mask token is never chosen. With `temperature` > 0 tokens are drawn with the random
    numbers `uniform` (B, l, V) in (0, 1), after keeping the likeliest tokens of total mass `top_p`.
    """
    logits = logits.float()
    log_probability = logits.log_softmax(-1)
    entropy = torch.special.entr(log_probability.exp()).sum(-1)  # 0 ln 0 is 0; NaN stays NaN
    allowed = logits.clone()
    allowed[..., mask_token_id] = -torch.inf
    if temperature > 0:
        assert uniform is not None
        allowed = _nucleus(allowed / temperature, top_p) - (-uniform.log()).log()  # Gumbel-max
    token = allowed.argmax(-1)
    probability = log_probability.gather(-1, token[..., None])[..., 0].exp()
    return Prediction(token, probability, entropy)


def _nucleus(logits: Tensor, top_p: float | None) -> Tensor:
    """Drop all but the smallest set of likeliest tokens whose probability reaches `top_p`."""
    if top_p is None:
        return logits
    ordered, order = logits.sort(-1, descending=True)
    probability = ordered.softmax(-1)
    beyond = probability.cumsum(-1) - probability >= top_p
    return logits.masked_fill(beyond.gather(-1, order.argsort(-1)), -torch.inf)


def commit_steps(prediction: Prediction, masked: Tensor, at: BlockStep) -> Tensor:
    """The n most confident positions, so that a block takes exactly `steps_per_block` forwards."""
    assert at.steps_per_block is not None
    quota, extra = divmod(masked.shape[1], at.steps_per_block)
    count = quota + (at.denoise_step < extra).long()  # (B,)
    score = prediction.probability.masked_fill(~masked, -torch.inf)
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return masked & (rank < count[:, None])


def commit_confidence(prediction: Prediction, masked: Tensor, at: BlockStep) -> Tensor:
    """Probability >= threshold, and always the most confident position (Fast-dLLM)."""
    assert at.threshold is not None
    return _at_least_the_best(prediction.probability, masked, prediction.probability >= at.threshold)


def commit_entropy(prediction: Prediction, masked: Tensor, at: BlockStep) -> Tensor:
    """Entropy <= threshold, and always the lowest-entropy position (dParallel)."""
    assert at.threshold is not None
    return _at_least_the_best(-prediction.entropy, masked, prediction.entropy <= at.threshold)


def _at_least_the_best(score: Tensor, masked: Tensor, chosen: Tensor) -> Tensor:
    best = score.masked_fill(~masked, -torch.inf).argmax(dim=1, keepdim=True)  # (B, 1)
    return masked & chosen.scatter(1, best, True)


RULES: dict[str, CommitRule] = {
    "steps": commit_steps,
    "confidence": commit_confidence,
    "entropy": commit_entropy,
}
