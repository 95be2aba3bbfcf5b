"""Near tokens against the trajectory, far ones against the teacher, on its canvas or a later one."""

import math

import numpy as np
import pytest
import torch

from dparallel.config.base import ConfigError
from dparallel.config.recipe import RecipeConfig
from dparallel.distillation import losses
from dparallel.distillation.batches import step_batches
from dparallel.distillation.corruption import View, near_tokens, view
from dparallel.distillation.data import Samples, check_samples, step_shape
from dparallel.distillation.recipe import loss, make_batch, make_views
from dparallel.models.backbone import DiffusionTransformer
from tests.dparallel.distillation.conftest import shipped, training_config

EOS, MASK = 2, 1
NEAR_FAR = RecipeConfig(region="response", masking="trajectory", near_far={"delta": 2, "far_weight": 0.5})
LATER = NEAR_FAR.model_copy(update={"near_far": NEAR_FAR.near_far.model_copy(update={"far_canvas": "later"})})


def test_near_tokens_by_hand() -> None:
    steps = np.array([4, 0, 5, 9, 3, 6])
    masked = steps >= 3  # the canvas of forward pass 3
    # delta 1: what pass 3 committed; 2: passes 3 and 4; 4: to 6, of which 5 and 6 have one each
    expected = {1: [4], 2: [0, 4], 3: [0, 2, 4], 4: [0, 2, 4, 5], 7: [0, 2, 3, 4, 5]}
    for delta, near in expected.items():
        assert np.flatnonzero(near_tokens(steps, masked, delta)).tolist() == near
    # the canvas after pass 6 has the next commit at pass 9, as if no pass lay between
    assert np.flatnonzero(near_tokens(steps, steps >= 7, 1)).tolist() == [3]


def test_weights_by_hand() -> None:
    chosen, near = np.array([True, False, True, True]), np.array([True, False, False, False])
    made = view(chosen, slice(1, 5), 7, near=near)
    assert made.masked.tolist() == [False, True, False, True, True, True, True]
    assert made.read.tolist() == [False, True, False, True, True, False, False]
    assert made.near.tolist() == [False, True, False, False, False, False, False]
    assert made.weight == pytest.approx([0, 1, 0, 0.5, 0.5, 0, 0])
    partly = view(chosen, slice(1, 5), 7, near=near, unread=np.array([True, False, True, False]))
    assert partly.weight == pytest.approx([0, 0, 0, 0, 1, 0, 0])  # no near one is left: its mean is 0


def test_every_step_of_the_trajectory_is_drawn() -> None:
    response, steps = np.arange(10, 16), np.array([3, 0, 1, 4, 2, 4])
    rng, seen = np.random.default_rng(0), set()
    for _ in range(200):
        (made,) = make_views(NEAR_FAR, response, steps, (EOS,), rng)
        first = steps[made.masked].min()
        assert made.masked.tolist() == (steps >= first).tolist()
        assert made.read.tolist() == made.masked.tolist()
        assert made.near.tolist() == ((steps >= first) & (steps < first + 2)).tolist()
        seen.add(int(first))
    assert seen == {0, 1, 2, 3, 4}


def two_views() -> list[View]:
    """Two samples of four response positions: three and two masked ones, of which one is near."""
    near = np.array([True, False, False, False])
    return [
        view(np.array([True, False, True, True]), slice(0, 4), 4, near=near),
        view(np.array([True, False, False, True]), slice(0, 4), 4, near=near),
    ]


def test_canvases_of_the_teacher_by_hand() -> None:
    prompts, responses = [np.array([5, 6]), np.array([5])], np.array([[11, 12, 13, 14], [21, 22, 23, 24]])
    views = [[view] for view in two_views()]
    same = make_batch(prompts, responses, views, MASK)
    assert same.canvas.tolist() == [[5, 6, 1, 12, 1, 1], [5, 1, 22, 23, 1, 1]]
    assert same.targets.tolist() == [11, 13, 14, 21, 24]
    assert same.near.tolist() == [True, False, False, True, False]
    assert torch.equal(same.asked.canvas, same.canvas)
    assert same.asked.read.nonzero().tolist() == [[0, 4], [0, 5], [1, 4]]  # the far ones
    assert same.student_inputs["logits_at"] is same.read
    later = make_batch(prompts, responses, views, MASK, later=True)
    assert torch.equal(later.canvas, same.canvas)
    assert later.asked.canvas.tolist() == [[5, 6, 11, 12, 1, 1], [5, 21, 22, 23, 1, 1]]  # near ones given
    longer = [np.array([7, 7, 5, 6]), np.array([7, 7, 5])]
    told = make_batch(prompts, responses, views, MASK, teacher_prompts=longer)
    assert told.asked.canvas.tolist() == [[7, 7, 5, 6, 1, 12, 1, 1], [7, 7, 5, 1, 22, 23, 1, 1]]
    assert told.asked.attention_mask.tolist() == [[True] * 8, [True] * 7 + [False]]
    assert told.asked.read.nonzero().tolist() == [[0, 6], [0, 7], [1, 6]]
    moved = told.to(torch.device("cpu"))
    assert torch.equal(moved.asked.canvas, told.asked.canvas)


def test_a_privileged_teacher_without_near_tokens_predicts_all_that_is_read() -> None:
    masked = view(np.array([True, False]), slice(0, 2), 2)
    batch = make_batch(
        [np.array([5])], np.array([[8, 9]]), [[masked]], MASK, teacher_prompts=[np.array([7, 5])]
    )
    assert batch.asked.canvas.tolist() == [[7, 5, 1, 9]]
    assert batch.asked.read.tolist() == [[False, False, True, False]]
    assert batch.teacher_inputs["input_ids"] is batch.asked.canvas
    assert batch.full_inputs["input_ids"] is batch.canvas


def test_divergence_by_hand() -> None:
    student = torch.log(torch.tensor([[3.0, 1, 1], [1, 3, 4]]))
    teacher = torch.log(torch.tensor([[2.0, 1, 1], [1, 3, 4]]))
    expected = 0.5 * math.log(0.5 / 0.6) + 2 * 0.25 * math.log(0.25 / 0.2)
    assert losses.divergence(student, teacher).tolist() == pytest.approx([expected, 0.0], abs=1e-6)
    sure = torch.tensor([[0.0, -1e9, -1e9]])  # a probability of 0 adds nothing
    assert losses.divergence(student[:1], sure).tolist() == pytest.approx([-math.log(0.6)])
    logits = student.clone().requires_grad_()
    losses.divergence(logits, teacher).sum().backward()
    expected_gradient = torch.tensor([[0.6 - 0.5, 0.2 - 0.25, 0.2 - 0.25], [0.0, 0, 0]])
    torch.testing.assert_close(logits.grad, expected_gradient, rtol=0, atol=1e-6)


def test_the_loss_by_hand() -> None:
    """Near means of -ln p, far means of KL, each averaged over the two samples, the latter times 0.5."""
    prompts, responses = [np.array([5]), np.array([5])], np.array([[0, 1, 1, 2], [2, 1, 1, 0]])
    batch = make_batch(prompts, responses, [[view] for view in two_views()], MASK)
    odds = torch.tensor([[3.0, 1, 1], [3, 1, 1], [1, 3, 4], [1, 3, 4], [1, 1, 2]])
    teacher = torch.tensor([[2.0, 1, 1], [1, 3, 4], [2, 1, 1]])  # of the far ones, the 2nd, 3rd and 5th
    made = loss(odds.log(), batch, NEAR_FAR, teacher.log())
    cross_entropies = [-math.log(3 / 5), -math.log(4 / 8)]
    first = (0.5 * math.log(0.5 / 0.6) + 0.5 * math.log(0.25 / 0.2) + 0.0) / 2
    second = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    assert made.cross_entropy.item() == pytest.approx(sum(cross_entropies) / 2)
    assert made.divergence.item() == pytest.approx((first + second) / 2)
    assert made.loss.item() == pytest.approx(sum(cross_entropies) / 2 + 0.5 * (first + second) / 2)
    far_only = NEAR_FAR.model_copy(update={"cross_entropy_weight": 0.0})
    assert loss(odds.log(), batch, far_only, teacher.log()).loss.item() == pytest.approx((first + second) / 4)
    with pytest.raises(ValueError, match="near_far without the teacher's logits"):
        loss(odds.log(), batch, NEAR_FAR)


@pytest.mark.parametrize("recipe", [NEAR_FAR, LATER], ids=["same", "later"])
def test_neither_forwards_nor_processes_change_a_step(
    tiny_model: DiffusionTransformer,
    samples: Samples,
    recipe: RecipeConfig,
) -> None:
    def step_loss(micro: int, processes: int) -> float:
        shape = step_shape(training_config(views_per_step=8, micro_batch_size=micro), 1, processes)
        terms = []
        with torch.no_grad():
            for rank in range(processes):
                for batch in step_batches(samples, recipe, shape, tiny_model.config, 3, 2, rank, processes):
                    teacher = tiny_model(**batch.teacher_inputs)
                    terms.append(loss(tiny_model(**batch.student_inputs), batch, recipe, teacher))
        if recipe is NEAR_FAR:  # the student is the teacher here
            assert all(term.divergence.abs() < 1e-6 for term in terms)
        else:
            assert all(term.divergence > 1e-6 for term in terms)
        return torch.stack([term.loss for term in terms]).mean().item()

    whole = step_loss(8, 1)
    assert step_loss(2, 1) == pytest.approx(whole, rel=1e-5)
    assert step_loss(2, 2) == pytest.approx(whole, rel=1e-5)


def test_trajectories_with_too_few_steps_are_refused(
    tiny_model: DiffusionTransformer,
    samples: Samples,
) -> None:
    recipe = shipped("near_far")
    check_samples(samples, recipe, tiny_model.config)  # 12 steps
    few = Samples(samples.prompts, samples.responses, samples.commit_step // 2)
    with pytest.raises(ConfigError, match=r"near_far\.delta=8 leaves no token far: .* at most 6 forward pas"):
        check_samples(few, recipe, tiny_model.config)
