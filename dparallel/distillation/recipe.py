"""A recipe put together: rows become views, views a batch of canvases, logits a loss.

Legend: G response positions, R canvases (views) in a batch, L canvas length, N positions read.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dparallel.config import RecipeConfig
from dparallel.distillation import losses
from dparallel.distillation.corruption import (
    View,
    draw_block,
    mask_at_random,
    mask_by_trajectory,
    view,
)


class Batch(NamedTuple):
    """The views of one sample stand beside each other."""

    canvas: Tensor  # int64 (R, L)
    attention_mask: Tensor | None  # bool (R, L), None where nothing is padded
    read: Tensor  # bool (R, L)
    targets: Tensor  # int64 (N,), in the row-major order of `read`
    view: Tensor  # int64 (N,), the canvas each target belongs to

    @property
    def tokens(self) -> int:
        """Canvas tokens without padding."""
        return self.canvas.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    def to(self, device: torch.device) -> "Batch":
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        canvas, read, targets, view = (
            each.to(device) for each in (self.canvas, self.read, self.targets, self.view)
        )
        return Batch(canvas, mask, read, targets, view)


class Loss(NamedTuple):
    """Means over samples of the sums over their views; `loss` is what is minimised."""

    loss: Tensor
    cross_entropy: Tensor
    certainty: Tensor


def make_views(
    recipe: RecipeConfig,
    response_ids: np.ndarray,
    commit_step: np.ndarray,
    eos_token_id: int,
    rng: np.random.Generator,
) -> list[View]:
    """The `recipe.views` views of one trajectory: (G,) tokens and the steps they were committed at."""
    gen_length = len(response_ids)
    if recipe.block_length is None:
        region = slice(0, gen_length)
    else:
        region = draw_block(response_ids, recipe.block_length, eos_token_id, recipe.eos_region_ratio, rng)
    if recipe.masking == "trajectory":
        chosen = mask_by_trajectory(commit_step[region], rng)
    else:
        chosen = mask_at_random(region.stop - region.start, recipe.mask_ratio, rng)
    both = [chosen, ~chosen] if recipe.complement else [chosen]
    return [view(each, region, gen_length) for each in both]


def make_batch(
    prompts: Sequence[np.ndarray],
    responses: np.ndarray,
    views: Sequence[Sequence[View]],
    mask_token_id: int,
) -> Batch:
    """Canvases of prompt and corrupted response, padded on the right.

    Args:
        prompts: token ids of each sample's prompt.
        responses: (samples, G) the teacher's tokens.
        views: the views of each sample.
    """
    gen_length = responses.shape[1]
    length = max(map(len, prompts)) + gen_length
    rows = sum(map(len, views))
    canvas = np.full((rows, length), mask_token_id, dtype=np.int64)
    targets = canvas.copy()
    read = np.zeros((rows, length), dtype=bool)
    real = np.zeros((rows, length), dtype=bool)
    row = 0
    for prompt, response, its_views in zip(prompts, responses, views, strict=True):
        end = len(prompt) + gen_length
        for masked, its_read in its_views:
            canvas[row, : len(prompt)] = prompt
            canvas[row, len(prompt) : end] = np.where(masked, mask_token_id, response)
            targets[row, len(prompt) : end] = response
            read[row, len(prompt) : end] = its_read
            real[row, :end] = True
            row += 1
    return Batch(
        canvas=torch.from_numpy(canvas),
        attention_mask=None if real.all() else torch.from_numpy(real),
        read=torch.from_numpy(read),
        targets=torch.from_numpy(targets[read]),
        view=torch.from_numpy(read.nonzero()[0]),
    )


def loss(logits: Tensor, batch: Batch, recipe: RecipeConfig) -> Loss:
    """The recipe's loss of a batch from its logits (N, V): a batch of n equals n batches of one."""
    rows = len(batch.canvas)
    samples = rows // recipe.views
    cross_entropy = losses.cross_entropy(logits, batch.targets, batch.view, rows).sum() / samples
    certainty = (
        losses.certainty(logits, batch.targets, batch.view, rows, recipe.certainty_temperature).sum()
        / samples
    )
    return Loss(cross_entropy + recipe.certainty_weight * certainty, cross_entropy, certainty)
