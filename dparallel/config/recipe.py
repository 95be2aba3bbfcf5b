"""The settings of a distillation recipe: masked positions x views x attention x loss terms x schedules."""

from typing import Annotated, Any, Literal

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

Ratio = Annotated[float, Field(ge=0, le=1)]


class Ramp(Config):
    """A ratio that goes in a straight line from `start` at the first train step to `end` at the last."""

    start: Ratio
    end: Ratio

    def at(self, progress: float) -> float:
        return (1 - progress) * self.start + progress * self.end  # exact at both ends


class Growth(Config):
    """A block length that grows: every divisor of the response length from `start` to `end`, in turn."""

    start: PositiveInt
    end: PositiveInt

    @model_validator(mode="after")
    def _grows(self) -> "Growth":
        if self.start > self.end:
            raise ValueError(f"start={self.start} is above end={self.end}: swap them")
        return self

    def at(self, progress: float, gen_length: int) -> int:
        lengths = [length for length in range(self.start, self.end + 1) if gen_length % length == 0]
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
    """What one distillation sample looks like, what its student attends to, and what its loss is.

    Args:
        region: where tokens are masked: inside one `block` (earlier blocks clean, later ones all masks),
            or in the whole `response`.
        block_length: positions in a block, for the region, block-causal attention and monotone noise.
            `{start: 16, end: 32}` grows over training; both must divide the response length.
        masking: `random` masks each position with probability p. `trajectory` keeps what the teacher
            had committed at a point of its own order. `monotone` (D2F) masks the k-th block's
            positions with probability p_k, p_1 <= p_2 <= ...: p_1 drawn from mask_ratio=[low, high], each
            next one adds U(0, 1) (high - p_1) / (blocks - 1).
        mask_ratio: p, default 0.5; [low, high] draws it for every sample; `{start: ..., end: ...}` in
            place of a number changes it over training. With `trajectory`, the point is where a share
            1 - p of the region was committed; by default it is drawn uniformly.
        complement: add a second view, in which the rest of the region is masked.
        attention: the student's attention pattern. `full`: all positions. `block_causal`: the prompt,
            earlier blocks and the position's own block; the prompt attends to itself only.
        targets: of the cross-entropy: the `trajectory`'s tokens, or the distribution that the `teacher`
            predicts for the same canvas with full attention.
        weighting: of the cross-entropy. `view_mean`: the mean over a view's positions, summed over a
            sample's views, averaged over samples. `inverse_ratio`: the mean of cross-entropy / p over all
            positions that a train step reads.
        cross_entropy_weight: of that term in the loss.
        certainty_weight: lambda, the weight of the entropy term, over masked positions whose argmax
            already is the teacher's token: the mean over a view's positions.
        certainty_temperature: T of the entropy term.
        certainty_on_complement: whether the complement view has that term.
        eos_region_ratio: how often a block with nothing but padding after the first end-of-sequence token
            is sampled, relative to a block with content; with `region: response`, how often it is read.
    """

    region: Literal["block", "response"] = "block"
    block_length: BlockLength | None = None
    masking: Literal["random", "trajectory", "monotone"]
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

    @property
    def views(self) -> int:
        return 2 if self.complement else 1

    @property
    def fixed_block_length(self) -> int | None:
        """The block length of a recipe that is `at` a point of the training, or that has no growth."""
        if isinstance(self.block_length, Growth):
            raise ValueError(
                f"block_length={_plain(self.block_length)} grows over training: take the recipe at a point"
            )
        return self.block_length

    def region_length(self, gen_length: int) -> int:
        """The largest number of response positions that a sample reads at any time of the training."""
        if self.region == "response" or self.block_length is None:
            return gen_length
        return self.block_length.end if isinstance(self.block_length, Growth) else self.block_length

    def misfit(self, gen_length: int) -> str | None:
        """The block length that does not divide a response of `gen_length`, as `block_length=5`, if any."""
        if isinstance(self.block_length, Growth):
            lengths = {f"block_length.{name}": length for name, length in self.block_length}
        else:
            lengths = {} if self.block_length is None else {"block_length": self.block_length}
        return next((f"{name}={length}" for name, length in lengths.items() if gen_length % length), None)

    def at(self, progress: float, gen_length: int) -> "RecipeConfig":
        """The recipe at a point of the training, its schedules resolved to numbers.

        Args:
            progress: 0 at the first train step, 1 at the last.
            gen_length: positions of a response; `misfit(gen_length)` must be None.
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
        """The bounds (low, high) that p is drawn between; equal where p is fixed, None where it is not given.

        Args:
            progress: as in `at`; None for a recipe without schedules.
        """
        if self.mask_ratio is None:
            return None
        both = self.mask_ratio if isinstance(self.mask_ratio, tuple) else (self.mask_ratio, self.mask_ratio)
        return _number(both[0], progress), _number(both[1], progress)

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
        if self.weighting == "inverse_ratio" and self.masking == "trajectory":
            raise ValueError(
                "weighting='inverse_ratio' with masking='trajectory': the teacher's order is not drawn "
                "with a probability; use weighting='view_mean', or masking='random' or 'monotone'"
            )
        if not self.certainty_on_complement and not self.complement:
            raise ValueError(
                "certainty_on_complement=false with complement=false: there is no complement view; drop "
                "certainty_on_complement or set complement: true"
            )
        if not self.cross_entropy_weight and not self.certainty_weight:
            raise ValueError(
                f"cross_entropy_weight={self.cross_entropy_weight:g}, certainty_weight="
                f"{self.certainty_weight:g}: nothing is left of the loss; give one of them a weight above 0"
            )
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
    """A setting as it is written in a file."""
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return value.model_dump() if isinstance(value, Config) else value
