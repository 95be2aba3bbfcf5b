"""Settings of a distillation recipe: masking, views, attention pattern, loss terms and schedules."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from dparallel.config.base import LIST, SECTION, VALUE, Config, form
from dparallel.config.recipe_misfits import misfits
from dparallel.config.recipe_parts import Group, NearFar, Ratio, Rollouts


class Ramp(Config):
    """A ratio that changes linearly from `start` (first train step) to `end` (last train step).

    Args:
        start, end: ratios at the first and the last train step.
    """

    start: Ratio
    end: Ratio

    def at(self, progress: float) -> float:
        """The ratio at `progress`, from 0 to 1."""
        return (1 - progress) * self.start + progress * self.end  # exact at both ends


class Growth(Config):
    """A growing block length: the divisors of the response length from `start` to `end`, in turn.

    Args:
        start, end: smallest and largest block length in tokens.
    """

    start: PositiveInt
    end: PositiveInt

    @model_validator(mode="after")
    def _grows(self) -> "Growth":
        if self.start > self.end:
            raise ValueError(f"start={self.start} is above end={self.end}: swap them")
        return self

    def lengths(self, gen_length: int) -> list[int]:
        """All block lengths, in ascending order."""
        return [length for length in range(self.start, self.end + 1) if gen_length % length == 0]

    def at(self, progress: float, gen_length: int) -> int:
        """The block length at `progress`, from 0 to 1."""
        lengths = self.lengths(gen_length)
        return lengths[min(int(progress * len(lengths)), len(lengths) - 1)]


Scheduled = Annotated[
    Annotated[Ratio, Tag(VALUE)] | Annotated[Ramp, Tag(SECTION)],
    Discriminator(form, "wrong_form", "Give a number from 0 to 1, or {start: ..., end: ...} of two of them"),
]
MaskRatio = Annotated[
    Annotated[Ratio, Tag(VALUE)]
    | Annotated[Ramp, Tag(SECTION)]
    | Annotated[tuple[Scheduled, Scheduled], Tag(LIST)],
    Discriminator(form),
]
BlockLength = Annotated[
    Annotated[PositiveInt, Tag(VALUE)] | Annotated[Growth, Tag(SECTION)],
    Discriminator(form, "wrong_form", "Give a number of positions, or {start: ..., end: ...} of two of them"),
]


class RecipeConfig(Config):
    """A distillation recipe: how canvases are corrupted, the student's attention pattern, and the loss.

    Args:
        region: where tokens are masked: in one `block` (earlier blocks are clean, later ones all masks), or
            in the whole `response`.
        block_length: positions per block, for the region, block-causal attention and monotone noise.
            `{start: 16, end: 32}` grows during training; both must divide the response length.
        masking: `random` masks each position with probability p. `trajectory` masks the tokens that the
            teacher (with `rollouts`, the student) had not yet committed at some point of its trajectory.
            `monotone` (D2F) masks the positions of block k with probability p_k, p_1 <= p_2 <= ...: p_1 is
            drawn from mask_ratio=[low, high], each following one adds U(0, 1) (high - p_1) / (blocks - 1).
            `group` (MultiTF): see `group`.
        mask_ratio: p, default 0.5. [low, high] draws p for each sample; `{start: ..., end: ...}` in place of
            a number changes it during training. With `trajectory`, the point is where a fraction 1 - p of
            the region is committed; the default draws it uniformly.
        complement: add a second view with the complementary positions of the region masked.
        attention: attention pattern of the student. `full`: all positions. `block_causal`: the prompt,
            earlier blocks and the position's own block; the prompt attends to itself only.
        targets: targets of the cross-entropy: the tokens of the `trajectory`, or the distribution that the
            `teacher` predicts for the same canvas with full attention.
        weighting: weighting of the cross-entropy. `view_mean`: mean over the positions of a view, summed
            over the views of a sample, averaged over samples. `inverse_ratio`: mean of cross-entropy / p over
            all positions of a train step.
        cross_entropy_weight: weight of the cross-entropy in the loss.
        certainty_weight: lambda, weight of the entropy term. The term is a mean over the masked positions of
            a view whose argmax is the teacher's token.
        certainty_temperature: T, temperature of the entropy term.
        certainty_on_complement: whether the entropy term applies to the complement view.
        near_far: targets by the step at which the teacher committed a token, see `NearFar`; with
            `masking: trajectory`.
        group: a group of noisy blocks after clean ones, see `Group`; with `masking: group`.
        own_tokens: share of the views whose masked positions are filled with the student's own predictions
            (OPUT), which takes another forward pass. The loss is then over all tokens of the region, masked,
            filled and given ones. None: nothing is filled, and given tokens have no loss.
        rollouts: train on canvases of the student's own decoding, not on the recorded ones; see `Rollouts`.
        teacher_prompt: prompt of the teacher where its distribution is a target: the student's (`ordinary`),
            or one with the reference answer (`privileged`), which `trajectories.privileged` records.
        only_correct: overrides `training.only_correct` for this recipe.
        eos_region_ratio: relative frequency of sampling a block that contains only padding after the first
            end-of-sequence token; with `region: response`, the frequency of keeping it.
    """

    file_kind: ClassVar[str] = "a recipe: give it as `students: {NAME: FILE}` of an experiment"

    region: Literal["block", "response"] = "block"
    block_length: BlockLength | None = None
    masking: Literal["random", "trajectory", "monotone", "group"]
    mask_ratio: MaskRatio | None = None
    complement: bool = False
    attention: Literal["full", "block_causal"] = "full"
    targets: Literal["trajectory", "teacher"] = "trajectory"
    weighting: Literal["view_mean", "inverse_ratio"] = "view_mean"
    cross_entropy_weight: NonNegativeFloat = 1.0
    certainty_weight: NonNegativeFloat = 0.0
    certainty_temperature: PositiveFloat = 0.5
    certainty_on_complement: bool = True
    eos_region_ratio: Ratio = 0.1
    # Omitted from dumps at their defaults, so that recipes without them keep their keys.
    near_far: NearFar | None = Field(None, exclude_if=lambda near_far: near_far is None)
    group: Group | None = Field(None, exclude_if=lambda group: group is None)
    own_tokens: Ratio | None = Field(None, exclude_if=lambda own_tokens: own_tokens is None)
    rollouts: Rollouts | None = Field(None, exclude_if=lambda rollouts: rollouts is None)
    teacher_prompt: Literal["ordinary", "privileged"] = Field(
        "ordinary", exclude_if=lambda teacher_prompt: teacher_prompt == "ordinary"
    )
    only_correct: bool | None = Field(None, exclude_if=lambda only_correct: only_correct is None)

    @property
    def views(self) -> int:
        """Number of canvases per sample."""
        return 2 if self.complement else 1

    @property
    def needs_steps(self) -> bool:
        """Whether it needs the steps at which the teacher committed its tokens."""
        return self.masking == "trajectory" and self.rollouts is None

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher's distribution is a target, so that training runs the teacher."""
        return self.targets == "teacher" or self.near_far is not None

    @property
    def fixed_block_length(self) -> int | None:
        """The block length as a number; raises if it changes during training (resolve it with `at` first)."""
        if isinstance(self.block_length, Growth):
            raise ValueError(
                f"block_length={_plain(self.block_length)} grows over training: take the recipe at a point"
            )
        return self.block_length

    def region_length(self, gen_length: int) -> int:
        """The largest number of response positions a sample reads at any point of the training."""
        if self.region == "response" or self.block_length is None:
            return gen_length
        block_length = self.block_length.end if isinstance(self.block_length, Growth) else self.block_length
        return min(block_length * (self.group.blocks if self.group else 1), gen_length)

    def misfit(self, gen_length: int) -> str | None:
        """The block length that does not divide `gen_length`, as `block_length=5`; None if all do."""
        if isinstance(self.block_length, Growth):
            lengths = {f"block_length.{name}": length for name, length in self.block_length}
        else:
            lengths = {} if self.block_length is None else {"block_length": self.block_length}
        return next((f"{name}={length}" for name, length in lengths.items() if gen_length % length), None)

    def at(self, progress: float, gen_length: int) -> "RecipeConfig":
        """The recipe at a point of the training, with schedules resolved to numbers.

        Args:
            progress: 0 at the first train step, 1 at the last.
            gen_length: response positions; `misfit(gen_length)` must be None.
        """
        length, ratio = self.block_length, self.mask_ratio
        if isinstance(length, Growth):
            length = length.at(progress, gen_length)
        if isinstance(ratio, tuple):
            ratio = (_number(ratio[0], progress), _number(ratio[1], progress))
        elif ratio is not None:
            ratio = _number(ratio, progress)
        return self.model_copy(update={"block_length": length, "mask_ratio": ratio})

    def ratio_bounds(self, progress: float | None = None) -> tuple[float, float] | None:
        """Bounds (low, high) from which p is drawn; equal if p is fixed, None if mask_ratio is not set.

        Args:
            progress: see `at`; None for a recipe without schedules.
        """
        if self.mask_ratio is None:
            return None
        both = self.mask_ratio if isinstance(self.mask_ratio, tuple) else (self.mask_ratio, self.mask_ratio)
        return _number(both[0], progress), _number(both[1], progress)

    def plain(self, name: str) -> Any:
        """A setting as written in a config file."""
        return _plain(getattr(self, name))

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("masking") == "random" and data.get("mask_ratio") is None:
            return {**data, "mask_ratio": 0.5}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> "RecipeConfig":
        self._check_blocks()
        self._check_ratio()
        if (problem := next(misfits(self), None)) is not None:
            raise ValueError(problem)
        return self

    def _check_blocks(self) -> None:
        setting = f"region={self.region!r}, masking={self.masking!r}, attention={self.attention!r}"
        if self.region == "block" and self.masking == "monotone":
            raise ValueError(
                f"{setting}: monotone noise is over the blocks of a whole response; set region: response, "
                "or masking: random"
            )
        by_blocks = self.region == "block" or self.attention == "block_causal" or self.masking == "monotone"
        if by_blocks and self.block_length is None:
            raise ValueError(f"{setting} with block_length=None: it works by blocks; give block_length")
        if not by_blocks and self.block_length is not None:
            raise ValueError(
                f"{setting} with block_length={_plain(self.block_length)}: nothing here works by blocks; "
                "drop block_length, or use region='block', masking='monotone' or attention='block_causal'"
            )

    def _check_ratio(self) -> None:
        given = f"mask_ratio={_plain(self.mask_ratio)}"
        if self.masking == "monotone" and not isinstance(self.mask_ratio, tuple):
            raise ValueError(
                f"masking='monotone' with {given}: give mask_ratio=[low, high], such as [0.2, 0.7]"
            )
        for progress, when in ((0.0, "at the start"), (1.0, "at the end")):
            bounds = self.ratio_bounds(progress)
            if bounds is not None and not bounds[0] <= bounds[1]:
                raise ValueError(f"{given}: {when} of training low={bounds[0]:g} is above high={bounds[1]:g}")
            if bounds is not None and not bounds[1]:
                raise ValueError(f"{given} masks nothing {when} of training: give a ratio above 0")


def _number(value: float | Ramp, progress: float | None) -> float:
    if not isinstance(value, Ramp):
        return value
    if progress is None:
        raise ValueError(f"mask_ratio: {_plain(value)} changes over training: take the recipe at a point")
    return value.at(progress)


def _plain(value: Any) -> Any:
    """A setting as written in a config file."""
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return value.model_dump() if isinstance(value, Config) else value
