"""Apply a recipe: trajectories to views, views to batches of canvases, logits to a loss.

Legend: G response positions, R canvases (views) in a batch, L canvas length, N positions read.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from dparallel.config.recipe import RecipeConfig
from dparallel.distillation import losses
from dparallel.distillation.corruption import (
    View,
    draw_block,
    draw_ratio,
    draw_unread,
    mask_at_random,
    mask_by_trajectory,
    mask_from_point,
    monotone_ratios,
    view,
)
from dparallel.models.attention import block_levels


class Batch(NamedTuple):
    """Canvases and the positions that count in the loss; views of a sample are adjacent rows."""

    canvas: Tensor  # int64 (R, L)
    attention_mask: Tensor | None  # bool (R, L), None without padding
    read: Tensor  # bool (R, L)
    targets: Tensor  # int64 (N,), in the row-major order of `read`
    view: Tensor  # int64 (N,), the canvas each target belongs to
    weight: Tensor  # float32 (N,), multiplied with the positions' cross-entropies and summed
    levels: Tensor | None = None  # int64 (R, L), attention pattern of the student; None for full attention

    @property
    def tokens(self) -> int:
        """Number of canvas tokens without padding."""
        return self.canvas.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    @property
    def teacher_inputs(self) -> dict[str, Any]:
        """Arguments of the teacher's forward pass, for logits (N, V)."""
        return {"input_ids": self.canvas, "attention_mask": self.attention_mask, "logits_at": self.read}

    @property
    def student_inputs(self) -> dict[str, Any]:
        """Arguments of the student's forward pass, for logits (N, V)."""
        if self.levels is None:
            return self.teacher_inputs
        return {"input_ids": self.canvas, "levels": self.levels, "logits_at": self.read}

    def to(self, device: torch.device) -> "Batch":
        """Move the tensors to `device`."""
        return Batch(*(tensor if tensor is None else tensor.to(device) for tensor in self))  # type: ignore[arg-type]


class Loss(NamedTuple):
    """`loss`, the weighted sum that is minimised, and its terms.

    `cross_entropy` uses the recipe's weighting; `certainty` is summed over views and averaged over samples.
    """

    loss: Tensor
    cross_entropy: Tensor
    certainty: Tensor


class Masks(NamedTuple):
    """The positions masked in the first view of a sample; the complement view masks the others."""

    region: slice  # the P response positions that may be masked
    masked: np.ndarray  # bool (P,)
    ratio: (
        np.ndarray | None
    )  # float (P,), the probability of being masked; None where it was not drawn by one
    unread: np.ndarray | None  # bool (G,), positions excluded from the loss


def make_views(
    recipe: RecipeConfig,
    response_ids: np.ndarray,
    commit_step: np.ndarray | None,
    end_token_ids: Sequence[int],
    rng: np.random.Generator,
) -> list[View]:
    """Draw the `recipe.views` views of a trajectory.

    Args:
        recipe: resolved with `at`, or without schedules.
        response_ids: (G,) the teacher's tokens.
        commit_step: (G,) the steps at which they were committed; None if the recipe does not need them.
    """
    masks = choose_masks(recipe, response_ids, commit_step, end_token_ids, rng)
    return views(masks, recipe, len(response_ids))


def choose_masks(
    recipe: RecipeConfig,
    response_ids: np.ndarray,
    commit_step: np.ndarray | None,
    end_token_ids: Sequence[int],
    rng: np.random.Generator,
) -> Masks:
    """Draw a region and its masked positions; for arguments see `make_views`."""
    gen_length, bounds = len(response_ids), recipe.ratio_bounds()
    block_length = recipe.fixed_block_length or gen_length

    # 1. Region
    region = slice(0, gen_length)
    if recipe.region == "block":
        region = draw_block(response_ids, block_length, end_token_ids, recipe.eos_region_ratio, rng)
    positions = region.stop - region.start

    # 2. Masked positions: from the teacher's trajectory, or at random with a ratio
    ratio: np.ndarray | None = None
    if recipe.masking == "trajectory" and commit_step is None:
        raise ValueError("masking='trajectory' without commit_step: the trajectories have no steps")
    if bounds is None:
        assert commit_step is not None
        masked = mask_by_trajectory(commit_step[region], rng)
    elif recipe.masking == "trajectory":
        assert commit_step is not None
        masked = mask_from_point(commit_step[region], draw_ratio(*bounds, rng))
    else:
        if recipe.masking == "monotone":
            ratios = monotone_ratios(gen_length // block_length, *bounds, rng)
        else:
            ratios = np.array([draw_ratio(*bounds, rng)])
        ratio = np.repeat(ratios, positions // len(ratios))
        masked = mask_at_random(ratio, rng)

    # 3. Blocks that contain only padding are excluded from the loss most of the time
    unread = None
    if recipe.region == "response" and recipe.block_length is not None:
        unread = draw_unread(response_ids, block_length, end_token_ids, recipe.eos_region_ratio, rng)
    return Masks(region, masked, ratio, unread)


def views(masks: Masks, recipe: RecipeConfig, gen_length: int) -> list[View]:
    """The view, and for a recipe with complement a second one that masks the rest of the region."""
    region, masked, ratio, unread = masks
    if recipe.weighting == "view_mean":  # equal weights for all positions
        ratio = None
    made = [view(masked, region, gen_length, ratio, unread)]
    if recipe.complement:
        made.append(view(~masked, region, gen_length, None if ratio is None else 1 - ratio, unread))
    return made


def normaliser(recipe: RecipeConfig, views: Sequence[Sequence[View]]) -> float:
    """Divisor of the weighted cross-entropies of a train step with the given `views` per sample."""
    if recipe.weighting == "view_mean":
        return len(views)
    return max(1, sum(int(view.read.sum()) for both in views for view in both))


def make_batch(
    prompts: Sequence[np.ndarray],
    responses: np.ndarray,
    views: Sequence[Sequence[View]],
    mask_token_id: int,
    scale: float | None = None,
    block_length: int | None = None,
) -> Batch:
    """Build canvases of prompt and corrupted response, padded on the right.

    Args:
        prompts: prompt token ids per sample.
        responses: (samples, G) the teacher's tokens.
        views: views per sample.
        scale: factor of the views' weights; default 1 / number of samples.
        block_length: block length of the student's block-causal attention; None for full attention.
    """
    gen_length = responses.shape[1]
    length = max(map(len, prompts)) + gen_length
    rows = sum(map(len, views))
    canvas = np.full((rows, length), mask_token_id, dtype=np.int64)
    targets = canvas.copy()
    read = np.zeros((rows, length), dtype=bool)
    real = np.zeros((rows, length), dtype=bool)
    weight = np.zeros((rows, length), dtype=np.float32)
    prompt_length = np.zeros(rows, dtype=np.int64)
    row = 0
    for prompt, response, its_views in zip(prompts, responses, views, strict=True):
        end = len(prompt) + gen_length
        for masked, its_read, its_weight in its_views:
            canvas[row, : len(prompt)] = prompt
            canvas[row, len(prompt) : end] = np.where(masked, mask_token_id, response)
            targets[row, len(prompt) : end] = response
            read[row, len(prompt) : end] = its_read
            weight[row, len(prompt) : end] = its_weight
            real[row, :end] = True
            prompt_length[row] = len(prompt)
            row += 1
    levels = None
    if block_length is not None:
        levels = block_levels(torch.arange(length), torch.from_numpy(prompt_length), block_length)
        levels[torch.from_numpy(~real)] = length  # padding: above all other levels
    return Batch(
        canvas=torch.from_numpy(canvas),
        attention_mask=None if real.all() else torch.from_numpy(real),
        read=torch.from_numpy(read),
        targets=torch.from_numpy(targets[read]),
        view=torch.from_numpy(read.nonzero()[0]),
        weight=torch.from_numpy(weight[read]) * (1 / len(prompts) if scale is None else scale),
        levels=levels,
    )


@torch.no_grad()
def teacher_logits(student: PeftModel, batch: Batch) -> Tensor:
    """Logits (N, V) of the base model (adapter disabled, full attention) at the positions read."""
    with student.disable_adapter():
        return student(**batch.teacher_inputs)


def loss(logits: Tensor, batch: Batch, recipe: RecipeConfig, teacher: Tensor | None = None) -> Loss:
    """The recipe's loss from the student's logits (N, V); a batch of n equals the mean of n batches of one.

    Args:
        teacher: the teacher's logits (N, V), required if `recipe.targets` is `teacher`.
    """
    rows = len(batch.canvas)
    if recipe.targets == "teacher":
        if teacher is None:
            raise ValueError(
                "targets='teacher' without the teacher's logits: give teacher_logits(student, batch)"
            )
        values = losses.soft_cross_entropy(logits, teacher)
    else:
        values = losses.cross_entropy(logits, batch.targets)
    cross_entropy = (batch.weight * values).sum()
    first = None if recipe.certainty_on_complement else batch.view % recipe.views == 0
    with torch.set_grad_enabled(torch.is_grad_enabled() and recipe.certainty_weight > 0):
        certainty = losses.certainty(
            logits, batch.targets, batch.view, rows, recipe.certainty_temperature, first
        ).sum() / (rows // recipe.views)
    total = recipe.cross_entropy_weight * cross_entropy + recipe.certainty_weight * certainty
    return Loss(total, cross_entropy, certainty)
