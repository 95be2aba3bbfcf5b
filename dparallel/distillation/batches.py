"""The canvases of a train step: a function of the seed, the step and the row, on any process."""

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
    """A process's share of the step's global batch, one forward at a time.

    The mean of the batches' losses, over all processes, is the train step's, however it is divided: what a
    weighting divides by is of the whole step, of which every process draws all views.

    Args:
        recipe: at this point of the training.
    """
    drawn = sample_order(seed, train_step, shape.samples, len(samples)).tolist()
    views = [
        make_views(
            recipe,
            samples.responses[sample],
            samples.commit_step[sample],
            model.eos_token_id,
            row_generator(seed, train_step, row),
        )
        for row, sample in enumerate(drawn)
    ]
    scale = shape.accumulation * processes / normaliser(recipe, views)
    block_length = recipe.fixed_block_length if recipe.attention == "block_causal" else None
    micro, share = shape.micro_samples, shape.micro_samples * shape.accumulation
    own = range(rank * share, (rank + 1) * share)
    by_length = sorted(own, key=lambda row: len(samples.prompts[drawn[row]]))  # the least padding
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
        )
