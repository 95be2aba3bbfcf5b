"""What a fitted commit rule reads of each position, and the small network that judges it; pure functions.

Legend: B rows, n positions read, F features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dparallel.rules.declaration import Context, Prediction, Weights

if TYPE_CHECKING:
    from torch import Tensor

FEATURES = (
    "log_doubt",  # logarithm of the probability of all other tokens
    "log_entropy",  # of the entropy, in nats
    "log_runner_up",  # of the probability of the second most likely token
    "position",  # in the block, 0 to 1
    "committed",  # share of the block that is committed
    "masked_before",  # masked positions of the block before this one, as a share of the block
)
SMALLEST = 1e-12  # of probabilities and entropies, before their logarithm


def features(prediction: Prediction, runner_up: Tensor, masked: Tensor, context: Context) -> Tensor:
    """The features of each position, (B, n, F) float64; only those of masked positions mean something.

    The step is not among them: in trajectories of one token per step it equals the committed share, and in
    decoding with several tokens it does not.

    Args:
        runner_up: (B, n) probability of the second most likely token.
        masked: (B, n) bool; the masked positions of the open blocks, all of which are read.
    """
    assert context.offsets is not None
    length, count = context.block_length, masked.long()
    block = context.offsets // length  # (B, n)
    left = count.new_zeros(len(count), context.blocks).scatter_add(1, block, count)  # masks of each block
    earlier = (left.cumsum(1) - left).gather(1, block)  # masks of earlier blocks
    columns = (
        prediction.doubt.double().clamp(min=SMALLEST).log(),
        prediction.entropy.double().clamp(min=SMALLEST).log(),
        runner_up.double().clamp(min=SMALLEST).log(),
        (context.offsets % length).double() / length,
        1 - left.gather(1, block).double() / length,
        (count.cumsum(1) - count - earlier).double() / length,
    )
    import torch

    return torch.stack(columns, -1)


def network(weights: Weights, values: Tensor) -> Tensor:
    """Logit that a token is the one finally committed, (B, n), of features (B, n, F)."""
    for place, (weight, bias) in enumerate(weights.layers):
        values = (values.tanh() if place else values) @ weight.T + bias
    return values[..., 0]
