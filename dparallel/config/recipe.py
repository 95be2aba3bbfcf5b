"""The settings of a distillation recipe: masked positions x views x attention x loss terms x schedules."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from dparallel.config.base import Config

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
        lengths = [each for each in range(self.start, self.end + 1) if gen_length % each == 0]
        return lengths[min(int(progress * len(lengths)), len(lengths) - 1)]


FORMS = {
    "mask_ratio": "a number from 0 to 1, or [low, high] of two of them to draw one for each sample; where a "
    "number stands, {start: ..., end: ...} changes it over training",
    "block_length": "a number of positions, or {start: ..., end: ...} to grow over training, start <= end",
}


class RecipeConfig(Config):
    """What one distillation sample looks like, whom its student sees, and what its loss is.

    Args:
        region: mask inside one `block` (earlier clean, later all masks) or the whole `response`.
        block_length: of the region, of block-causal attention and of monotone noise. It may grow over
            training, as `{start: 16, end: 32}`; both must divide the response length.
        masking: `random` masks each position with probability p; `trajectory` keeps what the teacher
            had committed by a point of its own order; `monotone` (D2F) masks the k-th block's
            positions with p_k, p_1 <= p_2 <= ...: p_1 drawn from mask_ratio=[low, high], each next adds
            U(0, 1) (high - p_1) / (blocks - 1).
        mask_ratio: p, 0.5 unless told; [low, high] draws it for each sample; `{start, end}` in place of a
            number changes it over training. With `trajectory`, the point is where 1 - p of the
            region was committed, or uniformly drawn where this is left out.
        complement: a second view that masks the rest of the region.
        attention: the student sees everything (`full`), or the prompt, earlier blocks and its own one
            (`block_causal`; the prompt sees itself).
        targets: of the cross-entropy: the `trajectory`'s tokens, or the distribution of the `teacher`, who
            sees the same canvas with full attention.
        weighting: of the cross-entropy: `view_mean` is the mean over each view's positions, summed over a
            sample's views, averaged over samples; `inverse_ratio` the mean over all positions read in
            a train step of cross-entropy / p.
        cross_entropy_weight: of that term in the loss.
        certainty_weight, certainty_temperature: lambda and T of the entropy term, over masked
            positions whose argmax already is the teacher's token: the mean over each view's.
        certainty_on_complement: whether the complement view has that term.
        eos_region_ratio: how often a block that holds nothing but padding after the first EOS is sampled,
            against a block with content; where the region is the response, how often it is read.
    """

    region: Literal["block", "response"] = "block"
    block_length: PositiveInt | Growth | None = None
    masking: Literal["random", "trajectory", "monotone"]
    mask_ratio: Ratio | Ramp | tuple[Ratio | Ramp, Ratio | Ramp] | None = None
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
        """Of a recipe `at` a point of the training, or without a growth."""
        if isinstance(self.block_length, Growth):
            raise ValueError(
                f"block_length={_plain(self.block_length)} grows over training: take the recipe at a point"
            )
        return self.block_length

    def region_length(self, gen_length: int) -> int:
        """The most positions of a response that a sample reads at any time of the training."""
        if self.region == "response" or self.block_length is None:
            return gen_length
        return self.block_length.end if isinstance(self.block_length, Growth) else self.block_length

    def misfit(self, gen_length: int) -> str | None:
        """The block length that does not divide a response of `gen_length`, as `block_length=5`, if any."""
        if isinstance(self.block_length, Growth):
            lengths = {f"block_length.{name}": length for name, length in self.block_length}
        else:
            lengths = {} if self.block_length is None else {"block_length": self.block_length}
        return next((f"{name}={each}" for name, each in lengths.items() if gen_length % each), None)

    def at(self, progress: float, gen_length: int) -> "RecipeConfig":
        """The recipe at a point of the training, its schedules resolved to numbers.

        Args:
            progress: 0 at the first train step, 1 at the last.
            gen_length: of the responses; `misfit(gen_length)` must be None.
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
        """Between which numbers p is drawn, equal where it is not drawn; None where p is not given.

        Args:
            progress: as of `at`; None for a recipe without schedules.
        """
        if self.mask_ratio is None:
            return None
        both = self.mask_ratio if isinstance(self.mask_ratio, tuple) else (self.mask_ratio, self.mask_ratio)
        return _number(both[0], progress), _number(both[1], progress)

    @field_validator(*FORMS, mode="wrap")
    @classmethod
    def _in_form(cls, value: Any, handler: Callable[[Any], Any], info: Any) -> Any:
        """One message instead of one for each form that it has not."""
        try:
            return handler(value)
        except ValidationError as error:
            raise ValueError(f"{value!r} has no valid form: give {FORMS[info.field_name]}") from error

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
    """As it stands in a file."""
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return value.model_dump() if isinstance(value, Config) else value
