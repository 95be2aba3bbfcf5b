"""Sections of a recipe: near and far tokens, groups of noisy blocks, and responses of the student."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from dparallel.config.base import HOW, Config
from dparallel.config.decoding import DecodingConfig

Ratio = Annotated[float, Field(ge=0, le=1)]


class NearFar(Config):
    """Different targets for near and for far tokens of a canvas of the teacher's trajectory (TAD).

    The canvas is the input of the teacher's forward pass s. Its masked tokens are near if the teacher
    committed them in one of the forward passes s to s + delta - 1, and far if later; with `rollouts`, the
    student decodes in place of the teacher. The loss is the mean cross-entropy of the near tokens against the
    trajectory, times `cross_entropy_weight`, plus the mean divergence KL(teacher || student) of the far
    tokens, times `far_weight`.

    Args:
        delta: number of forward passes of the teacher in which tokens are near.
        far_canvas: canvas on which the teacher predicts the far tokens. `same`: the student's. `later`: the
            input of its own forward pass s + delta, in which the near tokens are given (dOPSD).
        far_weight: weight of the divergence in the loss.
    """

    delta: PositiveInt = 8
    far_canvas: Literal["same", "later"] = "same"
    far_weight: PositiveFloat = 1.0


class Group(Config):
    """A group of consecutive noisy blocks after clean ones (MultiTF), as a pipelined decoder has them.

    The group begins at a block of the response, drawn as for `region: block`, and has 2 to `blocks` blocks
    (drawn uniformly), or fewer at the end of the response. Block k of n tokens has exactly int(p_k n) masks,
    with p_1 <= p_2 <= ...: a is drawn from `low`, b from `high`, p_1 from [U(a, b), b], and p_k from
    [p_(k - 1), b]. Later blocks are cut off.

    Args:
        blocks: largest number of blocks of a group.
        low, high: ranges of a and b.
    """

    blocks: Annotated[int, Field(ge=2)]
    low: tuple[Ratio, Ratio] = (0.001, 0.3)
    high: tuple[Ratio, Ratio] = (0.5, 1.0)

    @model_validator(mode="after")
    def _ascending(self) -> "Group":
        bounds = [*self.low, *self.high]
        if bounds != sorted(bounds):
            raise ValueError(
                f"low={list(self.low)}, high={list(self.high)}: the four numbers must ascend, as in "
                "low: [0.001, 0.3], high: [0.5, 1.0]"
            )
        return self


class Rollouts(Config):
    """Responses that the student decodes during its training, and whose canvases are the views (on-policy).

    Before the first train step and after every `every` ones, the student decodes `prompts` prompts of the
    trajectories. Until the next time, training uses the steps of these responses, and their tokens or the
    recorded ones.

    Args:
        every: train steps that use the same responses.
        prompts: number of responses decoded each time; fewer if there are fewer trajectories.
        decoding: how the student decodes. `gen_length` must be that of the trajectories. A rule that commits
            from the left, such as `contiguous`, leaves no token behind a masked one.
        tokens: tokens of the canvases. `own`: as the student decoded them, right or wrong. `recorded`: the
            teacher's, committed in the student's order, so that views are canvases of few-step decoding with
            right tokens.
        batch_size: responses decoded together in a process.
    """

    every: PositiveInt
    prompts: PositiveInt
    decoding: DecodingConfig
    tokens: Literal["own", "recorded"] = Field("own", exclude_if=lambda tokens: tokens == "own")
    batch_size: Annotated[PositiveInt, HOW] = 64

    @model_validator(mode="after")
    def _repeatable(self) -> "Rollouts":
        if self.decoding.temperature > 0 and self.decoding.seed is None:
            raise ValueError(
                f"decoding.temperature={self.decoding.temperature} without decoding.seed: give a seed; "
                "otherwise a training that was interrupted would go on with other draws"
            )
        return self

    def misfit(self, gen_length: int) -> str | None:
        """Why the responses cannot replace trajectories of `gen_length` tokens; None if they can."""
        if self.decoding.gen_length == gen_length:
            return None
        return (
            f"rollouts.decoding.gen_length={self.decoding.gen_length} is not the trajectories' response "
            f"length {gen_length}: set it to {gen_length}"
        )
