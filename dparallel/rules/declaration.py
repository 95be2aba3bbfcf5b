"""What a commit rule declares, what it reads, and what it returns.

Importing this imports no torch: settings and commands read the declarations.
Legend: B rows, n positions read, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class RuleError(ValueError):
    """A rule cannot be declared like this; the message names it and the remedy."""


COMMIT_RULE = "commit_rule.json"  # file of a checkpoint with the weights of its own commit rule


class Prediction(NamedTuple):
    """Predictions of a forward pass for the positions read."""

    token: Tensor  # (B, n)
    probability: Tensor  # (B, n) of `token`, float32
    entropy: Tensor  # (B, n) nats, over the full vocabulary, without temperature, float32
    doubt: Tensor  # (B, n) probability of all other tokens; resolves probabilities that round to 1
    log_probability: Tensor  # (B, n, V), float32
    drawn_from: Tensor  # (B, n, V), log_probability after temperature, top_p and top_k


class Weights(NamedTuple):
    """A small network, fitted for one model, that says whether a token is the one finally committed.

    Attributes:
        layers: weight (out, in) and bias (out,) of each layer, float64; tanh between them, one output.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]


class Context(NamedTuple):
    """What a rule may read besides the predictions: the blocks, each row's progress, earlier predictions."""

    blocks: int = 1  # of the response
    block_length: int = 0
    mask_token_id: int = -1
    block_forwards: Tensor | None = None  # (B,) forward passes since the block was opened
    previous: Tensor | None = None  # (B, n, V) log-probabilities of the previous forward pass
    seen: Tensor | None = None  # (B, n) bool, whether there is a previous prediction
    offsets: Tensor | None = None  # (B, n) positions in the response, ascending where masked
    weights: Weights | None = None  # of the model's own commit rule


class Choice(NamedTuple):
    """The positions `chosen` are committed, and always the masked position with the highest `score`."""

    score: Tensor  # (B, n)
    chosen: Tensor  # (B, n) bool; only its masked positions count


class Parameter(NamedTuple):
    """A number that a rule takes: a setting of decoding, and a keyword of the rule's function.

    Rules may share a name, such as `threshold`; the setting then belongs to the rule that is chosen.

    Attributes:
        meaning: in a few words, such as "smallest probability"; for messages, help and pages.
        default: None if the user must give a value.
        least, most: the smallest and the largest valid value; `most` is None if there is no limit.
        whole: takes whole numbers only.
    """

    meaning: str
    default: float | None = None
    least: float = 0
    most: float | None = None
    whole: bool = False

    @property
    def limits(self) -> str:
        return f"at least {self.least:g}" if self.most is None else f"{self.least:g} to {self.most:g}"


class Rule(NamedTuple):
    """A commit rule.

    Attributes:
        choose: its function, called as (prediction, masked (B, n) bool, context, **parameters).
        published: the method that it comes from, in a few words; empty if none is known.
        parameters: by name.
        whole_response: treats the response as one block, and may commit no token in a forward pass.
        needs_previous: compares with the predictions of the previous forward pass.
        needs_weights: reads weights that are fitted for the model and are part of its checkpoint.
    """

    choose: Callable[..., Choice]
    published: str
    parameters: Mapping[str, Parameter]
    whole_response: bool = False
    needs_previous: bool = False
    needs_weights: bool = False

    @property
    def whole(self) -> frozenset[str]:
        """The parameters that are whole numbers, also where others of their name are not."""
        return frozenset(name for name, parameter in self.parameters.items() if parameter.whole)

    @property
    def scheduled(self) -> bool:
        """Whether it commits on a schedule of `steps` forward passes."""
        return "steps" in self.parameters

    @property
    def settings(self) -> dict[str, float | None]:
        """Its parameters with their defaults; None if the user must give a value."""
        return {name: parameter.default for name, parameter in self.parameters.items()}
