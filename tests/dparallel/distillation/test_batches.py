"""The canvases of a train step, which do not depend on how the step is divided."""

import numpy as np
import pytest
import torch

from dparallel.config.recipe import RecipeConfig
from dparallel.distillation.batches import step_batches
from dparallel.distillation.data import Samples, step_shape
from dparallel.distillation.recipe import Batch, loss, make_batch, make_views, normaliser
from dparallel.models.backbone import DiffusionTransformer
from tests.dparallel.distillation.conftest import training_config

EOS, MASK = 2, 1
D2F = RecipeConfig(
    region="response",
    block_length=4,
    masking="monotone",
    mask_ratio=[0.2, 0.7],
    attention="block_causal",
    targets="teacher",
    weighting="inverse_ratio",
    certainty_weight=1.0,
    eos_region_ratio=0.0,
)
D3LLM = RecipeConfig(
    block_length=4,
    masking="trajectory",
    mask_ratio=[0.3, 0.8],
    complement=True,
    cross_entropy_weight=0.25,
    certainty_weight=0.5,
    certainty_on_complement=False,
)


def run_loss(model: DiffusionTransformer, batch: Batch, recipe: RecipeConfig) -> torch.Tensor:
    """The student's attention uses levels or not; the teacher is the same model without levels."""
    teacher = model(**batch.teacher_inputs).detach() if recipe.targets == "teacher" else None
    return loss(model(**batch.student_inputs), batch, recipe, teacher).loss


def step_loss(
    model: DiffusionTransformer, samples: Samples, recipe: RecipeConfig, micro: int, processes: int
) -> tuple[float, torch.Tensor]:
    """Loss and a gradient of a train step, averaged over forward passes and processes like in an engine."""
    shape = step_shape(training_config(views_per_step=16, micro_batch_size=micro), recipe.views, processes)
    batches = [
        batch
        for rank in range(processes)
        for batch in step_batches(samples, recipe, shape, model.config, 3, 2, rank, processes)
    ]
    assert len(batches) == shape.accumulation * processes
    total = torch.stack([run_loss(model, batch, recipe) for batch in batches]).mean()
    [gradient] = torch.autograd.grad(total, [model.layers[0].attention.q_proj.weight])
    return total.item(), gradient


@pytest.mark.parametrize("recipe", [D2F, D3LLM], ids=["inverse_ratio", "view_mean"])
def test_neither_forwards_nor_processes_change_a_step(
    tiny_model: DiffusionTransformer, samples: Samples, recipe: RecipeConfig
) -> None:
    whole, gradient = step_loss(tiny_model, samples, recipe, micro=16, processes=1)
    for micro, processes in ((8, 1), (2, 1), (16, 2), (4, 2), (2, 4)):
        divided, its_gradient = step_loss(tiny_model, samples, recipe, micro, processes)
        assert divided == pytest.approx(whole, rel=1e-5)
        torch.testing.assert_close(its_gradient, gradient, rtol=1e-4, atol=1e-6)


def test_any_number_of_processes_draws_the_same_canvases(
    tiny_model: DiffusionTransformer, samples: Samples
) -> None:
    """So a training may go on with another number of processes."""

    def drawn(train_step: int, processes: int) -> list[tuple[list[int], list[bool]]]:
        shape = step_shape(training_config(views_per_step=16), D2F.views, processes)
        rows = []
        for rank in range(processes):
            for batch in step_batches(samples, D2F, shape, tiny_model.config, 3, train_step, rank, processes):
                real = torch.ones_like(batch.read) if batch.attention_mask is None else batch.attention_mask
                for canvas, read, kept in zip(batch.canvas, batch.read, real, strict=True):
                    rows.append((canvas[kept].tolist(), read[kept].tolist()))
        return sorted(rows)

    for train_step in (1, 2, 5):
        assert drawn(train_step, 1) == drawn(train_step, 2) == drawn(train_step, 4)
    assert drawn(1, 1) != drawn(2, 1)


def test_inverse_ratio_is_one_mean_over_the_step(samples: Samples) -> None:
    """1/p of every position read, divided by their number; not a mean of means."""
    rng = np.random.default_rng(1)
    views = [
        make_views(D2F, response, steps, (EOS,), rng)
        for response, steps in zip(samples.responses, samples.commit_step, strict=True)
    ]
    reads = np.array([both[0].read for both in views])
    assert normaliser(D2F, views) == reads.sum()
    assert len(set(reads.sum(1))) > 3
    batch = make_batch(samples.prompts, samples.responses, views, MASK, scale=1 / normaliser(D2F, views))
    ratios = 1 / np.array([both[0].weight for both in views])[reads]
    assert batch.weight.tolist() == pytest.approx((1 / ratios / reads.sum()).tolist())
    assert ratios.min() >= 0.2 - 1e-6
    assert ratios.max() <= 0.7 + 1e-6
    # One ratio in a block, and none below the one before
    for both in views:
        of_blocks = [
            1 / both[0].weight[start : start + 4].max()
            for start in (0, 4, 8)
            if both[0].read[start : start + 4].any()
        ]
        assert of_blocks == sorted(of_blocks)
        for start in (0, 4, 8):
            assert len(set(both[0].weight[start : start + 4][both[0].read[start : start + 4]])) <= 1


def test_view_means_as_before(samples: Samples) -> None:
    """The weights of a view's positions sum to 1, those of a sample to 1 / samples of the step."""
    rng = np.random.default_rng(1)
    both = [make_views(D3LLM, samples.responses[i], samples.commit_step[i], (EOS,), rng) for i in range(3)]
    assert normaliser(D3LLM, both) == 3
    batch = make_batch(samples.prompts[:3], samples.responses[:3], both, MASK)
    sums = torch.zeros(6).index_add(0, batch.view, batch.weight)
    read = batch.read.any(1)
    assert sums.tolist() == pytest.approx((read / 3).tolist())


def test_padding_blocks_are_masked_but_not_read() -> None:
    rng = np.random.default_rng(0)
    response = np.array([7, 7, 7, 7, 7, EOS, EOS, EOS, EOS, EOS, EOS, EOS])
    drawn = [make_views(D2F, response, np.arange(12), (EOS,), rng)[0] for _ in range(300)]
    assert not any(view.read[8:].any() for view in drawn)
    assert np.mean([view.masked[8:] for view in drawn]) == pytest.approx(0.575, abs=0.05)
    assert all((view.read[:8] == view.masked[:8]).all() for view in drawn)
    some = D2F.model_copy(update={"eos_region_ratio": 0.5})
    drawn = [make_views(some, response, np.arange(12), (EOS,), rng)[0] for _ in range(600)]
    assert np.mean([view.read[8:] for view in drawn]) == pytest.approx(0.575 / 2, abs=0.04)


def test_levels_of_a_padded_batch_by_hand() -> None:
    rng = np.random.default_rng(0)
    prompts = [np.array([5, 5, 5]), np.array([5])]
    responses = np.full((2, 4), 7)
    recipe = D2F.model_copy(update={"block_length": 2})
    views = [make_views(recipe, each, np.arange(4), (EOS,), rng) for each in responses]
    batch = make_batch(prompts, responses, views, MASK, block_length=2)
    assert batch.levels is not None
    assert batch.levels.tolist() == [[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 2, 2, 7, 7]]
    assert "attention_mask" not in batch.student_inputs
    assert batch.teacher_inputs["attention_mask"].tolist()[1] == [True] * 5 + [False] * 2
    assert make_batch(prompts, responses, views, MASK).levels is None
    moved = batch.to(torch.device("cpu"))
    assert all(a is b or torch.equal(a, b) for a, b in zip(moved, batch, strict=True))


def test_the_student_alone_is_block_causal(tiny_model: DiffusionTransformer, samples: Samples) -> None:
    """Its logits are independent of later blocks and padding; the teacher's depend on later blocks."""
    shape = step_shape(training_config(views_per_step=8, micro_batch_size=8), 1, 1)
    [batch] = step_batches(samples, D2F, shape, tiny_model.config, 0, 1)
    assert batch.attention_mask is not None
    assert batch.levels is not None
    last = batch.levels == 3  # the third block, to which the first two must not attend
    changed = batch._replace(canvas=torch.where(last | ~batch.attention_mask, 9, batch.canvas))
    earlier = ~last[batch.read]
    with torch.no_grad():
        before, after = (tiny_model(**each.student_inputs) for each in (batch, changed))
        torch.testing.assert_close(before[earlier], after[earlier], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(before[~earlier], after[~earlier])
        before, after = (tiny_model(**each.teacher_inputs) for each in (batch, changed))
        assert (before[earlier] - after[earlier]).abs().max() > 1e-2


def test_targets_of_a_teacher_that_was_not_asked(tiny_model: DiffusionTransformer, samples: Samples) -> None:
    shape = step_shape(training_config(views_per_step=8, micro_batch_size=8), 1, 1)
    [batch] = step_batches(samples, D2F, shape, tiny_model.config, 0, 1)
    with pytest.raises(ValueError, match="targets='teacher' without the teacher's logits"):
        loss(tiny_model(**batch.student_inputs), batch, D2F)


def test_terms_have_their_weights(tiny_model: DiffusionTransformer, samples: Samples) -> None:
    """d3LLM's (CE + CE of the complement + 2 entropy) / 4, with the entropy of the first view only."""
    shape = step_shape(training_config(views_per_step=8, micro_batch_size=8), 2, 1)
    [batch] = step_batches(samples, D3LLM, shape, tiny_model.config, 0, 1)
    with torch.no_grad():
        logits = tiny_model(**batch.student_inputs)
        said = logits.argmax(-1)
    batch = batch._replace(targets=torch.where(torch.arange(len(said)) % 2 == 0, said, batch.targets))
    cross_entropies, certainties = [], []
    for view in range(8):
        its = batch.view == view
        wide, targets = logits[its].double(), batch.targets[its]
        probability = (wide / 0.5).softmax(-1)
        entropies = -(probability * probability.log()).sum(-1)[wide.argmax(-1) == targets]
        each = -wide.log_softmax(-1)[torch.arange(len(targets)), targets]
        cross_entropies.append(each.mean().item() if len(each) else 0.0)
        certainties.append(entropies.mean().item() if len(entropies) else 0.0)
    made = loss(logits, batch, D3LLM)
    assert sum(certainties[::2]) > 0
    assert sum(certainties[1::2]) > 0  # so that the complement's would be noticed
    assert made.cross_entropy.item() == pytest.approx(sum(cross_entropies) / 4, rel=1e-5)
    assert made.certainty.item() == pytest.approx(sum(certainties[::2]) / 4, rel=1e-5)
    expected = (sum(cross_entropies) + 2 * sum(certainties[::2])) / 4 / 4
    assert made.loss.item() == pytest.approx(expected, rel=1e-5)
    everywhere = D3LLM.model_copy(update={"certainty_on_complement": True})
    assert loss(logits, batch, everywhere).certainty.item() == pytest.approx(sum(certainties) / 4, rel=1e-5)
