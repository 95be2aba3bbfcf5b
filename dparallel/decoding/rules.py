"""Commit rules: pure functions from the predictions of a forward pass to the positions it commits.

To add a rule, write a function here, add it to `CHOOSERS`, and declare its settings in `config.rules`.
Legend: B rows, n positions read, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dparallel.config.rules import RULES


class Prediction(NamedTuple):
    """Predictions of a forward pass for the positions read."""

    token: Tensor  # (B, n)
    probability: Tensor  # (B, n) of `token`, float32
    entropy: Tensor  # (B, n) nats, over the full vocabulary, without temperature, float32
    doubt: Tensor  # (B, n) probability of all other tokens; resolves probabilities that round to 1
    log_probability: Tensor  # (B, n, V), float32
    drawn_from: Tensor  # (B, n, V), log_probability after temperature and top_p


class Setting(NamedTuple):
    """Parameters of a rule, the progress of each row's block, and the previous predictions."""

    threshold: float = 0.0
    stability_threshold: float = 0.0
    steps_per_block: int = 0
    block_length: int = 0
    mask_token_id: int = -1
    block_forwards: Tensor | None = None  # (B,) forward passes since the block was opened
    previous: Tensor | None = None  # (B, n, V) log-probabilities of the previous forward pass
    seen: Tensor | None = None  # (B, n) bool, whether there is a previous prediction


class Choice(NamedTuple):
    """The positions `chosen` are committed, and always the masked position with the highest `score`."""

    score: Tensor  # (B, n)
    chosen: Tensor  # (B, n) bool


def predict(
    logits: Tensor,
    mask_token_id: int,
    temperature: float = 0.0,
    top_p: float | None = None,
    uniform: Tensor | None = None,
) -> Prediction:
    """Predicted token, probability and entropy for `logits` (B, n, V), in float32.

    The mask token is never predicted.

    Args:
        temperature: above 0, tokens are sampled with the random numbers `uniform`.
        top_p: sample from the most likely tokens with this total probability.
        uniform: random numbers (B, n, V) in (0, 1).
    """
    log_probability = logits.float().log_softmax(-1)
    allowed, drawn_from = _without(log_probability, mask_token_id), log_probability
    if temperature > 0:
        assert uniform is not None
        drawn_from = _nucleus(allowed / temperature, top_p).log_softmax(-1)
        allowed = drawn_from - (-uniform.log()).log()  # Gumbel-max
    token = allowed.argmax(-1)
    probability = log_probability.gather(-1, token[..., None])[..., 0].exp()
    entropy, doubt = _certainty(token, log_probability)
    return Prediction(token, probability, entropy, doubt, log_probability, drawn_from)


def _certainty(token: Tensor, log_probability: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy, and the probability of all tokens other than `token` (B, n), to relative float32 precision.

    The entropy term of a nearly certain token is computed from the other tokens: 1 - p would round to 0 for
    all of them, and they could not be ranked.
    """
    rivals = log_probability.exp().scatter(-1, token[..., None], 0.0)
    doubt = rivals.sum(-1)
    own = log_probability.gather(-1, token[..., None])[..., 0]
    own = torch.where(doubt < 0.5, torch.log1p(-doubt), own.clamp(min=-1e4))
    # Clamp the logarithm of 0, since 0 ln 0 = 0; NaN remains NaN.
    return -(rivals * log_probability.clamp(min=-1e4)).sum(-1) - own.exp() * own, doubt


def commit(rule: str, prediction: Prediction, masked: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
    """Committed positions, (B, n) bool, at least the best one; and the rule's score of each, (B, n)."""
    score, chosen = CHOOSERS[rule](prediction, masked, setting)
    if not RULES[rule].whole_response:
        chosen = chosen | best(score, masked)
    return masked & chosen, score


def best(score: Tensor, candidates: Tensor) -> Tensor:
    """The first position with the highest score within `candidates`, (B, n) bool; none without candidates."""
    winner = score.masked_fill(~candidates, -torch.inf).argmax(dim=1, keepdim=True)  # (B, 1)
    return candidates & (torch.arange(score.shape[1], device=score.device) == winner)


def best_of_each(score: Tensor, candidates: Tensor, group: Tensor, groups: int) -> Tensor:
    """The first position with the highest score of each group, within `candidates`; (B, n) bool.

    Args:
        group: int64 (B, n), from 0 to `groups` - 1.
    """
    rows, n = score.shape
    lowest = score.new_full((rows, groups), -torch.inf)
    top = lowest.scatter_reduce(1, group, score.masked_fill(~candidates, -torch.inf), "amax")
    ties = candidates & ~(score < top.gather(1, group))  # includes scores that are NaN
    place = torch.arange(n, device=score.device).expand(rows, n)
    last = place.new_full((rows, groups), n)
    first = last.scatter_reduce(1, group, place.masked_fill(~ties, n), "amin")
    return ties & (place == first.gather(1, group))


def steps(prediction: Prediction, masked: Tensor, setting: Setting) -> Choice:
    """The n most confident positions; a block takes exactly `steps_per_block` forward passes."""
    assert setting.block_forwards is not None
    quota, extra = divmod(setting.block_length, setting.steps_per_block)
    count = quota + (setting.block_forwards < extra).long()  # (B,)
    return Choice(-prediction.doubt, _rank(-prediction.doubt, masked) < count[:, None])


def confidence(prediction: Prediction, masked: Tensor, setting: Setting) -> Choice:
    """Probability >= threshold (Fast-dLLM)."""
    return Choice(-prediction.doubt, prediction.doubt <= _complement(setting.threshold))


def entropy(prediction: Prediction, masked: Tensor, setting: Setting) -> Choice:
    """Entropy <= threshold (dParallel)."""
    return Choice(-prediction.entropy, prediction.entropy <= setting.threshold)


def entropy_budget(prediction: Prediction, masked: Tensor, setting: Setting) -> Choice:
    """The lowest entropies whose sum is <= threshold, a bound on the joint error (EB-Sampler)."""
    ordered, order = prediction.entropy.masked_fill(~masked, torch.inf).sort(dim=1, stable=True)
    within = ordered.cumsum(1) <= setting.threshold
    return Choice(-prediction.entropy, within.gather(1, order.argsort(dim=1)))


def margin(prediction: Prediction, masked: Tensor, setting: Setting) -> Choice:
    """Probability lead of the most likely token over the second >= threshold."""
    doubt = prediction.doubt + _runner_up(prediction.log_probability, setting.mask_token_id)  # 1 - lead
    return Choice(-doubt, doubt <= _complement(setting.threshold))


def stability(prediction: Prediction, masked: Tensor, setting: Setting) -> Choice:
    """Probability >= threshold, and little change since the previous forward pass (KLASS)."""
    assert setting.previous is not None
    assert setting.seen is not None
    now, before = prediction.log_probability, setting.previous
    moved = (now.exp() * (now.clamp(min=-1e4) - before.clamp(min=-1e4))).sum(-1)  # KL(now || before)
    stable = setting.seen & (moved <= setting.stability_threshold)
    return Choice(-prediction.doubt, stable & (prediction.doubt <= _complement(setting.threshold)))


def dream_entropy(prediction: Prediction, masked: Tensor, setting: Setting) -> Choice:
    """Dream's sampler by lowest entropy, of the distribution after temperature and top_p."""
    entropy, _ = _certainty(prediction.token, prediction.drawn_from)
    return _dream(-entropy, masked, setting)


def dream_maskgit_plus(prediction: Prediction, masked: Tensor, setting: Setting) -> Choice:
    """Dream's sampler by highest probability, of the distribution after temperature and top_p."""
    _, doubt = _certainty(prediction.token, prediction.drawn_from)
    return _dream(-doubt, masked, setting)


def dream_topk_margin(prediction: Prediction, masked: Tensor, setting: Setting) -> Choice:
    """Dream's sampler by largest lead over the second most likely token, after temperature and top_p."""
    likeliest = _without(prediction.drawn_from, setting.mask_token_id).argmax(-1)
    _, doubt = _certainty(likeliest, prediction.drawn_from)
    return _dream(-doubt - _runner_up(prediction.drawn_from, setting.mask_token_id), masked, setting)


def _dream(score: Tensor, masked: Tensor, setting: Setting) -> Choice:
    """Dream's schedule: time runs from 1 to 0.001; a step unmasks a share of the masks, the last one all."""
    assert setting.block_forwards is not None
    forwards = setting.steps_per_block
    time = torch.linspace(1, 1e-3, forwards + 1, device=score.device)
    share = 1 - time[1:] / time[:-1]
    last = setting.block_forwards >= forwards - 1
    step = setting.block_forwards.clamp(max=forwards - 1)
    count = torch.where(last, masked.sum(1), (masked.sum(1) * share[step]).long())  # (B,)
    return Choice(score, _rank(score, masked) < count[:, None])


# The function of each rule in `config.rules.RULES`: (prediction, masked (B, n) bool, setting) -> choice.
CHOOSERS: dict[str, Callable[[Prediction, Tensor, Setting], Choice]] = {
    "steps": steps,
    "confidence": confidence,
    "entropy": entropy,
    "entropy_budget": entropy_budget,
    "margin": margin,
    "stability": stability,
    "dream_entropy": dream_entropy,
    "dream_maskgit_plus": dream_maskgit_plus,
    "dream_topk_margin": dream_topk_margin,
}


def _complement(threshold: float) -> float:
    """The `doubt` at a probability of `threshold`; at 1, the rounding error of double precision."""
    return max(1 - threshold, 2.0**-53)


def _runner_up(log_probability: Tensor, mask_token_id: int) -> Tensor:
    """Probability of the second most likely token, excluding the mask token, (B, n)."""
    return _without(log_probability, mask_token_id).topk(2).values[..., 1].exp()


def _rank(score: Tensor, masked: Tensor) -> Tensor:
    """Rank of each position among the masked ones, the highest score first, (B, n)."""
    order = score.masked_fill(~masked, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1)


def _without(values: Tensor, token_id: int) -> Tensor:
    """`values` (..., V) with one token excluded."""
    tokens = torch.arange(values.shape[-1], device=values.device)
    return values.masked_fill(tokens == token_id, -torch.inf)


def _nucleus(logits: Tensor, top_p: float | None) -> Tensor:
    """Mask all logits except the smallest set of most likely tokens with total probability >= `top_p`."""
    if top_p is None:
        return logits
    ordered, order = logits.sort(-1, descending=True)
    probability = ordered.softmax(-1)
    beyond = probability.cumsum(-1) - probability >= top_p
    return logits.masked_fill(beyond.gather(-1, order.argsort(-1)), -torch.inf)
