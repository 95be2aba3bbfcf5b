"""Groups of noisy blocks after clean ones: their ratios, masks and canvases."""

from typing import Any

import numpy as np
import pytest
import torch

from dparallel.config.recipe import RecipeConfig
from dparallel.distillation.corruption import chained_ratios, draw_group, mask_counts
from dparallel.distillation.recipe import Masks, loss, make_batch, make_views, normaliser, views
from dparallel.models.backbone import DiffusionTransformer
from tests.dparallel.distillation.conftest import shipped

EOS, MASK = 2, 1
GROUP = RecipeConfig(
    block_length=2, masking="group", group={"blocks": 3}, attention="block_causal", eos_region_ratio=0.0
)


class Drawn:
    """A generator of given numbers from 0 to 1, for `uniform`, and of given whole numbers."""

    def __init__(self, *numbers: float, whole: int = 2):
        self.numbers, self.whole = list(numbers), whole

    def uniform(self, low: float, high: float) -> float:
        return low + self.numbers.pop(0) * (high - low)

    def integers(self, low: int, high: int, endpoint: bool) -> int:
        assert low <= self.whole <= high
        assert endpoint
        return self.whole


def test_chained_ratios_by_hand() -> None:
    # a = 0.1 + 0.5 * 0.2 = 0.2, b = 0.5 + 0.6 * 0.5 = 0.8; [0.2 + 0.5 * 0.6, b] = [0.5, 0.8];
    # p_1 = 0.5 + 0.3 / 3 = 0.6, p_2 = 0.6 + 0.5 * 0.2 = 0.7, p_3 = 0.8
    drawn: Any = Drawn(0.5, 0.6, 0.5, 1 / 3, 0.5, 1.0)
    assert chained_ratios(3, (0.1, 0.3), (0.5, 1.0), drawn).tolist() == pytest.approx([0.6, 0.7, 0.8])
    assert drawn.numbers == []
    rng = np.random.default_rng(0)
    many = np.array([chained_ratios(4, (0.001, 0.3), (0.5, 1.0), rng) for _ in range(2000)])
    assert (np.diff(many, axis=1) >= 0).all()
    # E[b] = 0.75, E[a] = 0.15; the distance to b is halved by each of the draws
    distance = (0.75 - 0.15) / 4
    assert many.mean(axis=0) == pytest.approx([0.75 - distance / 2**k for k in range(4)], abs=0.01)


def test_mask_counts_are_exact() -> None:
    rng = np.random.default_rng(0)
    drawn = np.array([mask_counts(np.array([0.0, 0.26, 0.5, 0.99, 1.0]), 8, rng) for _ in range(2000)])
    counts = drawn.reshape(-1, 5, 8).sum(axis=2)
    assert (counts == [0, 2, 4, 7, 8]).all()  # int(0.26 * 8) = 2, int(0.99 * 8) = 7
    assert drawn.reshape(-1, 5, 8).mean(axis=0)[1:4] == pytest.approx(
        np.repeat([[2 / 8], [4 / 8], [7 / 8]], 8, axis=1), abs=0.05
    )


def test_groups_begin_anywhere_and_end_with_the_response() -> None:
    rng, response = np.random.default_rng(0), np.full(10, 7)
    drawn = [draw_group(response, 2, 3, (EOS,), 1.0, rng) for _ in range(4000)]
    groups, counts = np.unique(
        [[group.start // 2, group.stop // 2] for group in drawn], axis=0, return_counts=True
    )
    shares = {
        (start, stop): count / 4000 for (start, stop), count in zip(groups.tolist(), counts, strict=True)
    }
    expected = {
        (0, 2): 0.1,
        (0, 3): 0.1,
        (1, 3): 0.1,
        (1, 4): 0.1,
        (2, 4): 0.1,
        (2, 5): 0.1,
        (3, 5): 0.2,
        (4, 5): 0.2,
    }
    assert shares == pytest.approx(expected, abs=0.03)
    padded = np.array([7, 7, 7, EOS, EOS, EOS, EOS, EOS, EOS, EOS])
    starts = {draw_group(padded, 2, 3, (EOS,), 0.0, rng).start for _ in range(200)}
    assert starts == {0, 2}  # not in padding


def test_views_have_a_clean_prefix_and_no_rest() -> None:
    rng, response = np.random.default_rng(0), np.array([7, 8, 9, 7, 8, 9, EOS, EOS, EOS, EOS])
    ends = set()
    for _ in range(300):
        (made,) = make_views(GROUP, response, np.arange(10), (EOS,), rng)
        (masked,) = np.nonzero(made.masked[: made.end])
        assert made.end % 2 == 0
        assert made.masked[made.end :].all()
        assert not made.read[made.end :].any()
        assert not made.read[8:].any()  # the last block is padding, the first EOS is content
        assert made.read[:8].tolist() == (made.masked & (np.arange(10) < made.end))[:8].tolist()
        assert len(masked) == 0 or made.end - 2 * (masked[0] // 2) <= 6  # at most three blocks
        assert made.weight.sum() == pytest.approx(float(made.read.any()))
        ends.add(made.end)
    assert ends == {4, 6, 8, 10}


def test_what_is_cut_off_changes_nothing(tiny_model: DiffusionTransformer) -> None:
    """The canvas has no row longer than needed, and the loss is that of whole canvases."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, 50, length) for length in (5, 3, 4)]
    responses = rng.integers(3, 50, (3, 12))
    views = [make_views(GROUP, response, np.arange(12), (EOS,), rng) for response in responses]
    cut = make_batch(prompts, responses, views, MASK, block_length=2)
    ends = [len(prompt) + made.end for prompt, [made] in zip(prompts, views, strict=True)]
    assert cut.canvas.shape == (3, max(ends))
    for row, end in enumerate(ends):
        assert (cut.levels[row, end:] == max(ends)).all()
        assert not cut.read[row, end:].any()
    whole = make_batch(
        prompts, responses, [[made._replace(end=None)] for [made] in views], MASK, block_length=2
    )
    assert whole.canvas.shape == (3, 17)
    with torch.no_grad():
        losses = [
            loss(tiny_model(**batch.student_inputs), batch, GROUP).loss.item() for batch in (cut, whole)
        ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] > 0


def test_the_teacher_reads_the_rest() -> None:
    """With full attention the rest is not without influence, so targets of the teacher need it."""
    asking = GROUP.model_copy(update={"targets": "teacher"})
    rng = np.random.default_rng(0)
    assert make_views(asking, np.full(10, 7), np.arange(10), (EOS,), rng)[0].end is None


def test_d2f_with_tokens_by_hand() -> None:
    """Cross-entropy against the trajectory's tokens over p_k, in one mean over all positions of the step."""
    recipe = RecipeConfig(
        region="response",
        block_length=2,
        masking="monotone",
        mask_ratio=[0.5, 0.5],
        attention="block_causal",
        weighting="inverse_ratio",
    )
    response = np.array([0, 1, 2, 0])
    (made,) = make_views(recipe, response, np.arange(4), (EOS + 90,), np.random.default_rng(5))
    batch = make_batch([np.array([5])], response[None], [[made]], MASK, scale=1 / 3, block_length=2)
    count = int(batch.read.sum())
    logits = torch.tensor([[3.0, 1, 1]]).log().repeat(count, 1)
    own = {0: -np.log(3 / 5), 1: -np.log(1 / 5), 2: -np.log(1 / 5)}
    expected = sum(own[int(token)] / 0.5 for token in batch.targets) / 3
    assert count > 1
    assert loss(logits, batch, recipe).loss.item() == pytest.approx(expected, rel=1e-5)


OTHERS = torch.tensor([[3.0, 1, 1]]).log()  # logits: 3/5, 1/5, 1/5
HIDDEN = 9


def test_a_step_of_d2f_with_tokens_by_hand() -> None:
    """Blocks with ratios 1/2, 1 and 1/4: every position over its own, in one mean over the step's four."""
    recipe = shipped("d2f_tokens").model_copy(update={"block_length": 2})
    first = Masks(slice(0, 4), np.array([True, False, True, True]), np.array([0.5, 0.5, 1, 1]), None)
    second = Masks(slice(0, 4), np.array([False, True, False, False]), np.array([0.25] * 4), None)
    made = [views(masks, recipe, 4) for masks in (first, second)]
    assert normaliser(recipe, made) == 4
    responses = np.array([[0, 1, 2, 0], [1, 1, 2, 2]])
    batch = make_batch([np.array([5])] * 2, responses, made, HIDDEN, scale=1 / 4, block_length=2)
    assert batch.canvas.tolist() == [[5, HIDDEN, 1, HIDDEN, HIDDEN], [5, 1, HIDDEN, 2, 2]]
    assert batch.targets.tolist() == [0, 2, 0, 1]
    assert batch.weight.tolist() == [2 / 4, 1 / 4, 1 / 4, 4 / 4]
    # (2 * 0.5108 + 1.6094 + 0.5108 + 4 * 1.6094) / 4
    assert loss(OTHERS.repeat(4, 1), batch, recipe).loss.item() == pytest.approx(2.394917, rel=1e-5)


def test_a_group_by_hand() -> None:
    """Two blocks of two after a clean one; the rest is cut off, and masked positions have equal weights."""
    recipe = shipped("group").model_copy(update={"block_length": 2})
    masks = Masks(slice(2, 6), np.array([True, False, True, True]), np.array([0.4, 0.4, 0.9, 0.9]), None)
    response = np.array([0, 1, 2, 0, 1, 0, 2, 2])
    made = views(masks, recipe, len(response))
    batch = make_batch([np.array([5])], response[None], [made], HIDDEN, block_length=2)
    assert batch.canvas.tolist() == [[5, 0, 1, HIDDEN, 0, HIDDEN, HIDDEN]]
    assert batch.levels.tolist() == [[0, 1, 1, 2, 2, 3, 3]]
    assert batch.targets.tolist() == [2, 1, 0]
    assert batch.weight.tolist() == pytest.approx([1 / 3] * 3)
    # (1.6094 + 1.6094 + 0.5108) / 3
    assert loss(OTHERS.repeat(3, 1), batch, recipe).loss.item() == pytest.approx(1.243234, rel=1e-5)


def test_a_privileged_teachers_loss_by_hand() -> None:
    """It predicts the same positions behind a longer prompt: cross-entropy with its 1/2, 1/4, 1/4."""
    recipe = RecipeConfig(masking="random", block_length=2, targets="teacher", teacher_prompt="privileged")
    masks = Masks(slice(0, 2), np.array([True, True]), None, None)
    made = views(masks, recipe, 4)
    response = np.array([0, 1, 2, 0])
    batch = make_batch([np.array([5])], response[None], [made], HIDDEN, teacher_prompts=[np.array([5, 2, 0])])
    its = batch.teacher_inputs
    assert its["input_ids"].tolist() == [[5, 2, 0, HIDDEN, HIDDEN, HIDDEN, HIDDEN]]
    assert its["logits_at"].nonzero().tolist() == [[0, 3], [0, 4]]
    teacher = torch.tensor([[2.0, 1, 1]]).log().repeat(2, 1)
    # 0.5108 / 2 + 1.6094 / 4 + 1.6094 / 4, at both positions
    found = loss(OTHERS.repeat(2, 1), batch, recipe, teacher).cross_entropy
    assert found.item() == pytest.approx(1.060132, rel=1e-5)
