"""The canvases of a train step, as a function of seed, step and row, independent of the process."""

from collections.abc import Iterator

from dparallel.config.recipe import RecipeConfig
from dparallel.distillation.data import Samples, StepShape, row_generator, sample_order
from dparallel.distillation.recipe import Batch, make_batch, make_views, normaliser
from dparallel.models.backbone import DiffusionConfig


def step_batches(
    samples: Samples,
    recipe: RecipeConfig,
    shape: StepShape,
    model: DiffusionConfig,
    seed: int,
    train_step: int,
    rank: int = 0,
    processes: int = 1,
) -> Iterator[Batch]:
    """Yield a process's share of the step's global batch, one forward pass at a time.

    The mean of the batches' losses over all processes is the loss of the train step, for any division into
    batches and processes: normalisation uses the whole step, whose views are drawn in every process.

    Args:
        recipe: resolved `at` this point of the training.
        model: the student's config.
    """
    drawn = sample_order(seed, train_step, shape.samples, len(samples)).tolist()
    views = [
        make_views(
            recipe,
            samples.responses[sample],
            None if samples.commit_step is None else samples.commit_step[sample],
            model.end_token_ids,
            row_generator(seed, train_step, row),
        )
        for row, sample in enumerate(drawn)
    ]
    scale = shape.accumulation * processes / normaliser(recipe, views)
    block_length = recipe.fixed_block_length if recipe.attention == "block_causal" else None
    later = recipe.near_far is not None and recipe.near_far.far_canvas == "later"
    micro, share = shape.micro_samples, shape.micro_samples * shape.accumulation
    own = range(rank * share, (rank + 1) * share)
    by_length = sorted(own, key=lambda row: len(samples.prompts[drawn[row]]))  # minimizes padding
    for start in range(0, share, micro):
        rows = by_length[start : start + micro]
        chosen = [drawn[row] for row in rows]
        yield make_batch(
            [samples.prompts[sample] for sample in chosen],
            samples.responses[chosen],
            [views[row] for row in rows],
            model.mask_token_id,
            scale,
            block_length,
            None
            if samples.teacher_prompts is None
            else [samples.teacher_prompts[sample] for sample in chosen],
            later,
        )
