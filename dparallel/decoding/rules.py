"""Commit rules: pure functions from one forward's predictions to the positions it fixes.

To add a rule, write one function here and one line in `RULES`.
Legend: B rows, n positions that were read, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Prediction(NamedTuple):
    """What one forward says about the positions read."""

    token: Tensor  # (B, n)
    probability: Tensor  # (B, n) of `token`, float32
    entropy: Tensor  # (B, n) nats, full vocabulary, no temperature, float32
    log_probability: Tensor  # (B, n, V), float32


class Setting(NamedTuple):
    """The rule's numbers, where each row's block stands and what the forward before predicted."""

    threshold: float = 0.0
    stability_threshold: float = 0.0
    steps_per_block: int = 0
    block_length: int = 0
    mask_token_id: int = -1
    block_forwards: Tensor | None = None  # (B,) forwards the open block has had
    previous: Tensor | None = None  # (B, n, V) log-probabilities of the forward before
    seen: Tensor | None = None  # (B, n) bool, whether there was one


class Choice(NamedTuple):
    """`chosen` (B, n) bool are committed, and of the masked ones always that of the highest `score`."""

    score: Tensor  # (B, n)
    chosen: Tensor  # (B, n) bool


class Rule(NamedTuple):
    """`choose(prediction, masked (B, n) bool, setting)`, and what its threshold may be."""

    choose: Callable[[Prediction, Tensor, Setting], Choice]
    threshold_limit: float | None = None
    needs_previous: bool = False


def predict(
    logits: Tensor,
    mask_token_id: int,
    temperature: float = 0.0,
    top_p: float | None = None,
    uniform: Tensor | None = None,
) -> Prediction:
    """Token, probability and entropy of `logits` (B, n, V), in float32.

    The mask token is never chosen. With `temperature` > 0 tokens are drawn with the random
    numbers `uniform` (B, n, V) in (0, 1), after keeping the likeliest tokens of total mass `top_p`.
    """
    log_probability = logits.float().log_softmax(-1)
    entropy = -(log_probability.exp() * log_probability.clamp(min=-1e4)).sum(-1)  # 0 ln 0 is 0
    allowed = _without(log_probability, mask_token_id)
    if temperature > 0:
        assert uniform is not None
        allowed = _nucleus(allowed / temperature, top_p) - (-uniform.log()).log()  # Gumbel-max
    token = allowed.argmax(-1)
    probability = log_probability.gather(-1, token[..., None])[..., 0].exp()
    return Prediction(token, probability, entropy, log_probability)


def commit(rule: Rule, prediction: Prediction, masked: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
    """The positions fixed, (B, n) bool, and the rule's score of every position, (B, n)."""
    score, chosen = rule.choose(prediction, masked, setting)
    return masked & (chosen | best(score, masked)), score


def best(score: Tensor, among: Tensor) -> Tensor:
    """The first position of the highest score among `among`, as a mask (B, n); empty where that is."""
    winner = score.masked_fill(~among, -torch.inf).argmax(dim=1, keepdim=True)  # (B, 1)
    return among & (torch.arange(score.shape[1], device=score.device) == winner)


def steps(prediction: Prediction, masked: Tensor, setting: Setting) -> Choice:
    """The n most confident positions, so that a block takes exactly `steps_per_block` forwards."""
    assert setting.block_forwards is not None
    quota, extra = divmod(setting.block_length, setting.steps_per_block)
    count = quota + (setting.block_forwards < extra).long()  # (B,)
    return Choice(prediction.probability, _rank(prediction.probability, masked) < count[:, None])


def confidence(prediction: Prediction, masked: Tensor, setting: Setting) -> Choice:
    """Probability >= threshold (Fast-dLLM)."""
    return Choice(prediction.probability, prediction.probability >= setting.threshold)


def entropy(prediction: Prediction, masked: Tensor, setting: Setting) -> Choice:
    """Entropy <= threshold (dParallel)."""
    return Choice(-prediction.entropy, prediction.entropy <= setting.threshold)


def entropy_budget(prediction: Prediction, masked: Tensor, setting: Setting) -> Choice:
    """The surest positions whose entropies sum to <= threshold: a bound on the joint error (EB-Sampler)."""
    ordered, order = prediction.entropy.masked_fill(~masked, torch.inf).sort(dim=1, stable=True)
    within = ordered.cumsum(1) <= setting.threshold
    return Choice(-prediction.entropy, within.gather(1, order.argsort(dim=1)))


def margin(prediction: Prediction, masked: Tensor, setting: Setting) -> Choice:
    """The likeliest token leads the next by >= threshold."""
    first, second = (
        _without(prediction.log_probability, setting.mask_token_id).topk(2).values.exp().unbind(-1)
    )
    return Choice(first - second, first - second >= setting.threshold)


def stability(prediction: Prediction, masked: Tensor, setting: Setting) -> Choice:
    """Probability >= threshold, and hardly moved since the forward before (KLASS)."""
    assert setting.previous is not None
    assert setting.seen is not None
    now, before = prediction.log_probability, setting.previous
    moved = (now.exp() * (now.clamp(min=-1e4) - before.clamp(min=-1e4))).sum(-1)  # KL(now || before)
    stable = setting.seen & (moved <= setting.stability_threshold)
    return Choice(prediction.probability, stable & (prediction.probability >= setting.threshold))


RULES: dict[str, Rule] = {
    "steps": Rule(steps),
    "confidence": Rule(confidence, threshold_limit=1),
    "entropy": Rule(entropy),
    "entropy_budget": Rule(entropy_budget),
    "margin": Rule(margin, threshold_limit=1),
    "stability": Rule(stability, threshold_limit=1, needs_previous=True),
}


def _rank(score: Tensor, masked: Tensor) -> Tensor:
    """Place of each position when the masked ones are ordered from the highest score, (B, n)."""
    order = score.masked_fill(~masked, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1)


def _without(values: Tensor, token_id: int) -> Tensor:
    """`values` (..., V) with one token made impossible."""
    tokens = torch.arange(values.shape[-1], device=values.device)
    return values.masked_fill(tokens == token_id, -torch.inf)


def _nucleus(logits: Tensor, top_p: float | None) -> Tensor:
    """Drop all but the smallest set of likeliest tokens whose probability reaches `top_p`."""
    if top_p is None:
        return logits
    ordered, order = logits.sort(-1, descending=True)
    probability = ordered.softmax(-1)
    beyond = probability.cumsum(-1) - probability >= top_p
    return logits.masked_fill(beyond.gather(-1, order.argsort(-1)), -torch.inf)
