"""Predictions of a forward pass, and the positions that a rule selects from them.

Legend: B rows, n positions read, V vocabulary.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dparallel.rules.declaration import Choice, Context, Prediction
from dparallel.rules.rules import RULES, certainty, without


def predict(
    logits: Tensor,
    mask_token_id: int,
    temperature: float = 0.0,
    top_p: float | None = None,
    uniform: Tensor | None = None,
    top_k: int | None = None,
) -> Prediction:
    """Predicted token, probability and entropy for `logits` (B, n, V), in float32.

    The mask token is never predicted.

    Args:
        temperature: above 0, tokens are sampled with the random numbers `uniform`.
        top_p: sample from the most likely tokens with this total probability.
        uniform: random numbers (B, n, V) in (0, 1).
        top_k: sample from so many most likely tokens.
    """
    log_probability = logits.float().log_softmax(-1)
    allowed, drawn_from = without(log_probability, mask_token_id), log_probability
    if temperature > 0:
        assert uniform is not None
        drawn_from = _likeliest(_nucleus(allowed / temperature, top_p), top_k).log_softmax(-1)
        allowed = drawn_from - (-uniform.log()).log()  # Gumbel-max
    token = allowed.argmax(-1)
    probability = log_probability.gather(-1, token[..., None])[..., 0].exp()
    entropy, doubt = certainty(token, log_probability)
    return Prediction(token, probability, entropy, doubt, log_probability, drawn_from)


def choose(
    rule: str, parameters: Mapping[str, float], prediction: Prediction, masked: Tensor, context: Context
) -> Choice:
    """The masked positions that a rule selects, which may be none, and its score of each."""
    score, chosen = RULES[rule].choose(prediction, masked, context, **parameters)
    return Choice(score, masked & chosen)


def _nucleus(logits: Tensor, top_p: float | None) -> Tensor:
    """Mask all logits except the smallest set of most likely tokens with total probability >= `top_p`."""
    if top_p is None:
        return logits
    ordered, order = logits.sort(-1, descending=True)
    probability = ordered.softmax(-1)
    beyond = probability.cumsum(-1) - probability >= top_p
    return logits.masked_fill(beyond.gather(-1, order.argsort(-1)), -torch.inf)


def _likeliest(logits: Tensor, top_k: int | None) -> Tensor:
    """Mask all logits except the `top_k` highest; of equal ones at the limit, all are kept, as in Dream."""
    if top_k is None:
        return logits
    least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)
