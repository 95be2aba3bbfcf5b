"""Combinations of a recipe's settings that make no sense, each with its remedy."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dparallel.config.decoding import DecodingConfig
from dparallel.config.modes import modes_of
from dparallel.rules.rules import RULES

if TYPE_CHECKING:
    from dparallel.config.recipe import RecipeConfig


def misfits(recipe: "RecipeConfig") -> Iterator[str]:
    """Messages about settings that do not fit together, the most important one first."""
    yield from _of_group(recipe)
    yield from _of_near_far(recipe)
    yield from _of_own_tokens(recipe)
    yield from _of_rollouts(recipe)
    if recipe.teacher_prompt == "privileged" and not recipe.asks_teacher:
        yield (
            "teacher_prompt='privileged' with targets='trajectory': the teacher is not asked; drop "
            "teacher_prompt, or set targets: teacher or near_far"
        )
    if recipe.weighting == "inverse_ratio" and recipe.masking in ("trajectory", "group"):
        yield (
            f"weighting='inverse_ratio' with masking={recipe.masking!r}: its positions are not drawn "
            "independently with a probability; use weighting='view_mean', or masking='random' or 'monotone'"
        )
    if not recipe.certainty_on_complement and not recipe.complement:
        yield (
            "certainty_on_complement=false with complement=false: there is no complement view; drop "
            "certainty_on_complement or set complement: true"
        )
    if not recipe.cross_entropy_weight and not recipe.certainty_weight and recipe.near_far is None:
        yield (
            f"cross_entropy_weight={recipe.cross_entropy_weight:g}, certainty_weight="
            f"{recipe.certainty_weight:g}: nothing is left of the loss; give one of them a weight above 0"
        )


def _of_group(recipe: "RecipeConfig") -> Iterator[str]:
    if recipe.masking == "group" and recipe.group is None:
        yield "masking='group' with group=None: give the section group, such as {blocks: 4}"
    if recipe.masking != "group" and recipe.group is not None:
        yield f"group with masking={recipe.masking!r}: it has no effect; set masking: group, or drop group"
    if recipe.masking != "group":
        return
    if recipe.region != "block":
        yield (
            f"masking='group' with region={recipe.region!r}: earlier blocks are clean and later ones are cut "
            "off; set region: block"
        )
    if recipe.attention != "block_causal":
        yield (
            f"masking='group' with attention={recipe.attention!r}: a student with full attention reads the "
            "masks after the group, which are cut off here; set attention: block_causal, or "
            "masking: random or trajectory"
        )
    if recipe.mask_ratio is not None:
        yield (
            f"masking='group' with mask_ratio={recipe.plain('mask_ratio')}: the ratios are drawn from "
            "group.low and group.high; drop mask_ratio"
        )


def _of_near_far(recipe: "RecipeConfig") -> Iterator[str]:
    if recipe.near_far is None:
        return
    if recipe.masking != "trajectory":
        yield (
            f"near_far with masking={recipe.masking!r}: near and far are steps of a trajectory; set "
            "masking: trajectory, or drop near_far"
        )
    if recipe.complement:
        yield (
            "near_far with complement=true: the complement of a canvas is no canvas of the trajectory; set "
            "complement: false"
        )
    if recipe.targets != "trajectory":
        yield (
            f"near_far with targets={recipe.targets!r}: the targets of near tokens are the trajectory's, "
            "those of far ones the teacher's distribution; drop targets"
        )


def _of_own_tokens(recipe: "RecipeConfig") -> Iterator[str]:
    if recipe.own_tokens is None:
        return
    given = f"own_tokens={recipe.own_tokens:g}"
    if recipe.near_far is not None or recipe.targets != "trajectory":
        other = "near_far" if recipe.near_far else f"targets={recipe.targets!r}"
        yield (
            f"{given} with {other}: the loss is over all tokens of the region, of which the "
            "teacher predicts the masked ones only; use targets: trajectory without near_far"
        )
    if recipe.complement:
        yield (
            f"{given} with complement=true: the loss is over all tokens of the region already; set "
            "complement: false"
        )
    if recipe.certainty_weight:
        yield (
            f"{given} with certainty_weight={recipe.certainty_weight:g}: its mean would be over given tokens "
            "too; set certainty_weight: 0"
        )
    if recipe.weighting != "view_mean":
        yield (
            f"{given} with weighting={recipe.weighting!r}: tokens that are not masked have no ratio; use "
            "weighting='view_mean'"
        )


def _of_rollouts(recipe: "RecipeConfig") -> Iterator[str]:
    if recipe.rollouts is None:
        return
    own, decoding = recipe.rollouts.tokens == "own", recipe.rollouts.decoding
    learnt = recipe.cross_entropy_weight > 0 or recipe.near_far is None
    if own and recipe.targets == "trajectory" and learnt:
        yield (
            f"rollouts with targets='trajectory', cross_entropy_weight={recipe.cross_entropy_weight:g}: the "
            "tokens are the student's own, right or wrong; set rollouts.tokens: recorded, "
            "targets: teacher, or cross_entropy_weight: 0 with near_far"
        )
    if not own and recipe.masking != "trajectory":
        yield (
            f"rollouts.tokens='recorded' with masking={recipe.masking!r}: only the steps are the student's, "
            "and nothing here reads them; set masking: trajectory, or drop rollouts"
        )
    valid = modes_of(recipe.attention)
    if decoding.mode not in valid:
        yield (
            f"rollouts.decoding.mode={decoding.mode!r} with attention={recipe.attention!r}: such a student "
            f"is decoded with mode={' or '.join(map(repr, valid))}"
        )
    if RULES[decoding.rule].needs_weights:
        yield (
            f"rollouts.decoding.rule={decoding.rule!r}: its weights are fitted to a student after training; "
            "use another rule"
        )
    most = decoding.most_forwards
    if recipe.near_far is not None and recipe.near_far.delta >= most:
        yield (
            f"near_far.delta={recipe.near_far.delta} leaves no token far: rollouts.decoding has at most "
            f"{most} forward passes; choose a smaller delta"
        )
    yield from _of_its_canvases(recipe, decoding)


def _of_its_canvases(recipe: "RecipeConfig", decoding: DecodingConfig) -> Iterator[str]:
    """Views of rollouts that would be no canvases of the student's decoding."""
    lengths = block_lengths(recipe, decoding.gen_length)
    if recipe.attention == "block_causal":
        for length in lengths:
            if length != decoding.block_length:
                yield (
                    f"block_length={length} with rollouts.decoding.block_length={decoding.block_length}: a "
                    "student with attention='block_causal' is decoded in the blocks that it is trained with; "
                    "give both the same value"
                )
    if recipe.masking != "trajectory":
        return
    if decoding.revises:
        yield (
            f"rollouts.decoding.mode={decoding.mode!r} with masking='trajectory': its steps are those of the "
            "last change of a token, not of its commitment; use mode='sequential' or 'multi_block'"
        )
    if decoding.eos_fill is not None and recipe.rollouts is not None and recipe.rollouts.tokens == "recorded":
        yield (
            f"rollouts.decoding.eos_fill={decoding.eos_fill!r} with rollouts.tokens='recorded': where the "
            "student ends too early, views would show the rest of the recorded response; drop eos_fill"
        )
    if recipe.region != "block" or recipe.attention == "block_causal":
        return
    if decoding.mode != "sequential":
        yield (
            f"rollouts.decoding.mode={decoding.mode!r} with region='block': earlier blocks are shown "
            "complete, which they are with mode='sequential' only; use it, or region: response"
        )
    for length in lengths:
        if length % decoding.block_length:
            yield (
                f"block_length={length} with rollouts.decoding.block_length={decoding.block_length}: "
                "earlier blocks are shown complete, which they are at multiples of the decoded block; give "
                "both the same value, or region: response"
            )


def block_lengths(recipe: "RecipeConfig", gen_length: int) -> list[int]:
    """All block lengths of a training, in ascending order."""
    length = recipe.block_length
    if length is None or isinstance(length, int):
        return [] if length is None else [length]
    return length.lengths(gen_length)
