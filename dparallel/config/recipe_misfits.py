"""Combinations of a recipe's settings that make no sense, each with its remedy."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dparallel.config.modes import MODES

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
    if recipe.weighting != "view_mean":
        yield (
            f"{given} with weighting={recipe.weighting!r}: tokens that are not masked have no ratio; use "
            "weighting='view_mean'"
        )


def _of_rollouts(recipe: "RecipeConfig") -> Iterator[str]:
    if recipe.rollouts is None:
        return
    own = recipe.rollouts.tokens == "own"
    if own and recipe.targets == "trajectory" and recipe.cross_entropy_weight > 0:
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
    mode = recipe.rollouts.decoding.mode
    if recipe.attention not in MODES[mode].patterns:
        valid = [name for name, known in MODES.items() if recipe.attention in known.patterns]
        yield (
            f"rollouts.decoding.mode={mode!r} with attention={recipe.attention!r}: such a student is decoded "
            f"with mode={' or '.join(map(repr, valid))}"
        )
