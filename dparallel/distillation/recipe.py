"""Apply a recipe: trajectories to views, views to batches of canvases, logits to a loss.

Legend: G response positions, R canvases (views) in a batch, L canvas length, N positions read.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from dparallel.config.recipe import RecipeConfig
from dparallel.distillation import losses
from dparallel.distillation.corruption import (
    View,
    chained_ratios,
    draw_block,
    draw_group,
    draw_ratio,
    draw_unread,
    mask_at_random,
    mask_by_trajectory,
    mask_counts,
    mask_from_point,
    monotone_ratios,
    near_tokens,
    view,
)
from dparallel.models.attention import block_levels


class Asked(NamedTuple):
    """Canvases of the teacher where they are not those of the student, and the positions it predicts."""

    canvas: Tensor  # int64 (R, L')
    attention_mask: Tensor | None  # bool (R, L'), None without padding
    read: Tensor  # bool (R, L'), of the same tokens and in the same order as the student's

    def to(self, device: torch.device) -> "Asked":
        """Move the tensors to `device`."""
        return Asked(*(tensor if tensor is None else tensor.to(device) for tensor in self))  # type: ignore[arg-type]


class Batch(NamedTuple):
    """Canvases and the positions that count in the loss; views of a sample are adjacent rows."""

    canvas: Tensor  # int64 (R, L)
    attention_mask: Tensor | None  # bool (R, L), None without padding
    read: Tensor  # bool (R, L)
    targets: Tensor  # int64 (N,), in the row-major order of `read`
    view: Tensor  # int64 (N,), the canvas each target belongs to
    weight: Tensor  # float32 (N,), multiplied with the positions' cross-entropies and summed
    levels: Tensor | None = None  # int64 (R, L), attention pattern of the student; None for full attention
    near: Tensor | None = None  # bool (N,), near positions; None if the recipe does not tell near from far
    asked: Asked | None = None  # the teacher's canvases; None if they are the student's
    fill: Tensor | None = None  # bool (R, L), positions to be filled with the student's predictions

    @property
    def tokens(self) -> int:
        """Number of canvas tokens without padding."""
        return self.canvas.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    @property
    def full_inputs(self) -> dict[str, Any]:
        """Arguments of a forward pass with full attention on the student's canvases, for logits (N, V)."""
        return {"input_ids": self.canvas, "attention_mask": self.attention_mask, "logits_at": self.read}

    @property
    def teacher_inputs(self) -> dict[str, Any]:
        """Arguments of the teacher's forward pass, for logits (N, V), with near positions of the far ones."""
        if self.asked is None:
            return self.full_inputs
        canvas, attention_mask, read = self.asked
        return {"input_ids": canvas, "attention_mask": attention_mask, "logits_at": read}

    @property
    def student_inputs(self) -> dict[str, Any]:
        """Arguments of the student's forward pass, for logits (N, V)."""
        if self.levels is None:
            return self.full_inputs
        return {"input_ids": self.canvas, "levels": self.levels, "logits_at": self.read}

    def to(self, device: torch.device) -> "Batch":
        """Move the tensors to `device`."""
        return Batch(*(tensor if tensor is None else tensor.to(device) for tensor in self))  # type: ignore[arg-type]


class Loss(NamedTuple):
    """`loss`, the weighted sum that is minimised, and its terms.

    `cross_entropy` uses the recipe's weighting; `certainty` and `divergence` are summed over views and
    averaged over samples. `divergence` is 0 without `near_far`.
    """

    loss: Tensor
    cross_entropy: Tensor
    certainty: Tensor
    divergence: Tensor


class Masks(NamedTuple):
    """The positions masked in the first view of a sample; the complement view masks the others."""

    region: slice  # the P response positions that may be masked
    masked: np.ndarray  # bool (P,)
    ratio: (
        np.ndarray | None
    )  # float (P,), the probability of being masked; None where it was not drawn by one
    unread: np.ndarray | None  # bool (P,), positions excluded from the loss
    near: np.ndarray | None = None  # bool (P,), near positions, of the masked ones
    filled: bool | None = None  # whether the student's own predictions fill the masked positions


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
    eos_ratio = recipe.eos_region_ratio
    if recipe.group is not None:
        most = recipe.group.blocks
        region = draw_group(response_ids, block_length, most, end_token_ids, eos_ratio, rng)
    elif recipe.region == "block":
        region = draw_block(response_ids, block_length, end_token_ids, eos_ratio, rng)
    positions = region.stop - region.start

    # 2. Masked positions: from the teacher's trajectory, or at random with a ratio
    ratio: np.ndarray | None = None
    if recipe.masking == "trajectory" and commit_step is None:
        raise ValueError("masking='trajectory' without commit_step: the trajectories have no steps")
    if recipe.group is not None:
        blocks = positions // block_length
        ratios = chained_ratios(blocks, recipe.group.low, recipe.group.high, rng)
        masked = mask_counts(ratios, block_length, rng)
    elif bounds is None:
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
    if recipe.group is not None or (recipe.region == "response" and recipe.block_length is not None):
        unread = draw_unread(response_ids, block_length, end_token_ids, eos_ratio, rng)[region]

    # 4. Near positions, and whether the student's predictions fill the masks
    near = None
    if recipe.near_far is not None:
        assert commit_step is not None
        near = near_tokens(commit_step[region], masked, recipe.near_far.delta)
    filled = None if recipe.own_tokens is None else bool(rng.random() < recipe.own_tokens)
    return Masks(region, masked, ratio, unread, near, filled)


def views(masks: Masks, recipe: RecipeConfig, gen_length: int) -> list[View]:
    """The view, and for a recipe with complement a second one that masks the rest of the region."""
    region, masked, ratio, unread, near, filled = masks
    if recipe.weighting == "view_mean":  # equal weights for all positions
        ratio = None
    given_too = recipe.own_tokens is not None
    end = region.stop if recipe.group is not None and not recipe.asks_teacher else None
    first = view(masked, region, gen_length, ratio, unread, near, given_too)
    made = [first._replace(filled=filled, end=end)]
    if recipe.complement:
        other = view(~masked, region, gen_length, None if ratio is None else 1 - ratio, unread)
        made.append(other._replace(end=end))
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
    teacher_prompts: Sequence[np.ndarray] | None = None,
    later: bool = False,
) -> Batch:
    """Build canvases of prompt and corrupted response, padded on the right.

    Args:
        prompts: prompt token ids per sample.
        responses: (samples, G) the teacher's tokens.
        views: views per sample.
        scale: factor of the views' weights; default 1 / number of samples.
        block_length: block length of the student's block-causal attention; None for full attention.
        teacher_prompts: the teacher's prompts where they are not the student's.
        later: whether the teacher is given the near tokens.
    """
    pairs = [(sample, view) for sample, its_views in enumerate(views) for view in its_views]
    made = [view for _, view in pairs]
    tokens = [responses[sample, : view.end] for sample, view in pairs]
    rows = _Rows([prompts[sample] for sample, _ in pairs], list(map(len, tokens)))

    # 1. The student's canvases, and what is read of them
    canvas = rows.canvas(tokens, [view.masked for view in made], mask_token_id)
    read = rows.placed([view.read for view in made], False)
    weight = rows.placed([view.weight for view in made], np.float32(0))
    targets = rows.placed(tokens, mask_token_id)
    levels = None
    if block_length is not None:
        levels = block_levels(torch.arange(rows.length), torch.tensor(rows.starts), block_length)
        levels[torch.from_numpy(~rows.real)] = rows.length  # padding: above all other levels

    # 2. What the student's predictions fill
    fill = None
    if made[0].filled is not None:
        own = np.array([view.filled for view in made])
        fill = torch.from_numpy(read & (canvas == mask_token_id) & own[:, None])

    # 3. The teacher's canvases and the positions that it predicts: all that are read, or the far ones
    near, asked = None, None
    if made[0].near is not None:
        near = rows.placed([_given(view.near) for view in made], False)
    if near is not None or teacher_prompts is not None:
        its = rows
        if teacher_prompts is not None:
            its = _Rows([teacher_prompts[sample] for sample, _ in pairs], rows.lengths)
        far = [view.read if view.near is None else view.read & ~view.near for view in made]
        masked = [view.masked & ~_given(view.near) if later else view.masked for view in made]
        asked = Asked(
            torch.from_numpy(its.canvas(tokens, masked, mask_token_id)),
            its.attention_mask,
            torch.from_numpy(its.placed(far, False)),
        )
    return Batch(
        canvas=torch.from_numpy(canvas),
        attention_mask=rows.attention_mask,
        read=torch.from_numpy(read),
        targets=torch.from_numpy(targets[read]),
        view=torch.from_numpy(read.nonzero()[0]),
        weight=torch.from_numpy(weight[read]) * (1 / len(prompts) if scale is None else scale),
        levels=levels,
        near=None if near is None else torch.from_numpy(near[read]),
        asked=asked,
        fill=fill,
    )


class _Rows:
    """Rows of a prompt and response positions, padded on the right."""

    def __init__(self, prompts: Sequence[np.ndarray], lengths: Sequence[int]):
        self.prompts, self.lengths = prompts, lengths
        self.starts = list(map(len, prompts))
        ends = np.array(self.starts) + lengths
        self.length = int(ends.max())
        self.real = np.arange(self.length) < ends[:, None]  # (R, L)

    @property
    def attention_mask(self) -> Tensor | None:
        return None if self.real.all() else torch.from_numpy(self.real)

    def placed(self, values: Sequence[np.ndarray], elsewhere: Any) -> np.ndarray:
        """Values of the response positions (G,) per row, and `elsewhere` at all others: (R, L)."""
        placed = np.full((len(values), self.length), elsewhere)
        for row, (start, length, value) in enumerate(zip(self.starts, self.lengths, values, strict=True)):
            placed[row, start : start + length] = value[:length]
        return placed

    def canvas(
        self, tokens: Sequence[np.ndarray], masked: Sequence[np.ndarray], mask_token_id: int
    ) -> np.ndarray:
        """Prompt, and the tokens that are not masked; int64 (R, L)."""
        shown = [
            np.where(hidden[: len(response)], mask_token_id, response)
            for response, hidden in zip(tokens, masked, strict=True)
        ]
        canvas = self.placed(shown, np.int64(mask_token_id))
        for row, prompt in enumerate(self.prompts):
            canvas[row, : len(prompt)] = prompt
        return canvas


def _given(near: np.ndarray | None) -> np.ndarray:
    assert near is not None, "the views of a batch are of one recipe"
    return near


@torch.no_grad()
def base_logits(student: PeftModel, inputs: dict[str, Any]) -> Tensor:
    """Logits (N, V) of the base model for a batch's inputs: without the adapter, with full attention."""
    with student.disable_adapter():
        return student(**inputs)


def teacher_logits(student: PeftModel, batch: Batch) -> Tensor:
    """Logits (N, V) of the base model for the batch's `teacher_inputs`."""
    return base_logits(student, batch.teacher_inputs)


@torch.no_grad()
def with_own_tokens(
    student: nn.Module, batch: Batch, mask_token_id: int, in_every_process: bool = False
) -> Batch:
    """The batch with the student's most likely tokens at the positions to be filled (OPUT).

    The student runs without dropout, and only for the rows with such positions.

    Args:
        in_every_process: run it even if there are none, as other processes do (ZeRO stage 3).
    """
    assert batch.fill is not None, "views of a recipe with own_tokens"
    rows = batch.fill.any(dim=1)
    if not rows.any():
        if not in_every_process:
            return batch
        rows[0] = True
    inputs = {name: part if part is None else part[rows] for name, part in batch.student_inputs.items()}
    training = student.training
    student.eval()
    logits = student(**{**inputs, "logits_at": batch.fill[rows]})
    student.train(training)
    logits[:, mask_token_id] = -torch.inf
    return batch._replace(canvas=batch.canvas.masked_scatter(batch.fill, logits.argmax(dim=-1)))


def loss(logits: Tensor, batch: Batch, recipe: RecipeConfig, teacher: Tensor | None = None) -> Loss:
    """The recipe's loss from the student's logits (N, V); a batch of n equals the mean of n batches of one.

    Args:
        teacher: the teacher's logits, required if `recipe.asks_teacher`: (N, V), or with `near_far` those of
            the far positions.
    """
    rows = len(batch.canvas)
    if recipe.asks_teacher and teacher is None:
        what = "near_far" if recipe.near_far else "targets='teacher'"
        raise ValueError(f"{what} without the teacher's logits: give teacher_logits(student, batch)")
    divergence = logits.new_zeros((), dtype=torch.float32)
    if batch.near is not None:
        assert teacher is not None
        near, far = batch.near, ~batch.near
        cross_entropy = (batch.weight[near] * losses.cross_entropy(logits[near], batch.targets[near])).sum()
        divergence = (batch.weight[far] * losses.divergence(logits[far], teacher)).sum()
    elif recipe.targets == "teacher":
        assert teacher is not None
        cross_entropy = (batch.weight * losses.soft_cross_entropy(logits, teacher)).sum()
    else:
        cross_entropy = (batch.weight * losses.cross_entropy(logits, batch.targets)).sum()
    first = None if recipe.certainty_on_complement else batch.view % recipe.views == 0
    with torch.set_grad_enabled(torch.is_grad_enabled() and recipe.certainty_weight > 0):
        certainty = losses.certainty(
            logits, batch.targets, batch.view, rows, recipe.certainty_temperature, first
        ).sum() / (rows // recipe.views)
    total = recipe.cross_entropy_weight * cross_entropy + recipe.certainty_weight * certainty
    if recipe.near_far is not None:
        total = total + recipe.near_far.far_weight * divergence
    return Loss(total, cross_entropy, certainty, divergence)
