"""Views filled with the student's own predictions, and a loss over all their tokens."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dparallel.config.experiment import LoraSettings
from dparallel.config.recipe import RecipeConfig
from dparallel.distillation.corruption import view
from dparallel.distillation.recipe import loss, make_batch, make_views, with_own_tokens
from dparallel.models.lora import attach
from tests.conftest import random_model

EOS, MASK = 2, 1
OPUT = RecipeConfig(region="response", masking="random", mask_ratio=0.75, own_tokens=0.5)


def test_all_tokens_are_read_and_half_of_the_views_filled() -> None:
    rng, filled, masked = np.random.default_rng(0), [], []
    for _ in range(800):
        (made,) = make_views(OPUT, np.full(8, 7), np.arange(8), (EOS,), rng)
        assert made.read.all()
        assert made.weight == pytest.approx(np.full(8, 1 / 8))
        filled.append(made.filled)
        masked.append(made.masked.mean())
    assert np.mean(filled) == pytest.approx(0.5, abs=0.05)
    assert np.mean(masked) == pytest.approx(0.75, abs=0.02)
    never = OPUT.model_copy(update={"own_tokens": 0.0})
    assert not any(make_views(never, np.full(4, 7), np.arange(4), (), rng)[0].filled for _ in range(50))
    # in a block, later masks are not read, and are not filled
    block = RecipeConfig(
        block_length=2, masking="random", mask_ratio=1.0, own_tokens=1.0, eos_region_ratio=1.0
    )
    (made,) = make_views(block, np.array([7, 7, 7, 7]), np.arange(4), (EOS,), np.random.default_rng(1))
    assert (made.read.sum(), made.filled) == (2, True)
    batch = make_batch([np.array([5])], np.array([[7, 7, 7, 7]]), [[made]], MASK)
    assert torch.equal(batch.fill, batch.read)


class Says(nn.Module):
    """A student that predicts given tokens at the positions asked for, and would rather say the mask."""

    def __init__(self, *tokens: int):
        super().__init__()
        self.tokens, self.asked = tokens, []

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_at: torch.Tensor
    ) -> torch.Tensor:
        assert not self.training
        self.asked.append((input_ids.tolist(), logits_at.nonzero().tolist()))
        logits = torch.zeros(int(logits_at.sum()), 10)
        logits[:, MASK] = 9.0
        logits[range(len(self.tokens)), self.tokens] = 5.0
        return logits


def filled_batch(*filled: bool):
    chosen = (np.array([True, False, True]), np.array([False, True, False]), np.array([True, True, False]))
    views = [
        [view(masked, slice(0, 3), 3, given_too=True)._replace(filled=own)]
        for masked, own in zip(chosen, filled, strict=True)
    ]
    return make_batch([np.array([5])] * 3, np.array([[6, 7, 8]] * 3), views, MASK)


def test_filling_by_hand() -> None:
    batch, student = filled_batch(True, False, True), Says(3, 4, 6, 9).train()
    assert batch.canvas.tolist() == [[5, 1, 7, 1], [5, 6, 1, 8], [5, 1, 1, 8]]
    made = with_own_tokens(student, batch, MASK)
    assert student.training
    # the first and third rows only, at their masks
    assert student.asked == [([[5, 1, 7, 1], [5, 1, 1, 8]], [[0, 1], [0, 3], [1, 1], [1, 2]])]
    assert made.canvas.tolist() == [[5, 3, 7, 4], [5, 6, 1, 8], [5, 6, 9, 8]]
    assert made.targets.tolist() == [6, 7, 8] * 3
    assert torch.equal(made.read, batch.read)


def test_nothing_to_fill_takes_no_forward_pass_unless_others_do() -> None:
    batch, student = filled_batch(False, False, False), Says()
    assert with_own_tokens(student, batch, MASK) is batch
    assert student.asked == []
    assert torch.equal(with_own_tokens(student, batch, MASK, in_every_process=True).canvas, batch.canvas)
    assert len(student.asked) == 1


def test_the_loss_by_hand() -> None:
    """The mean of -ln p over all three tokens of each row, averaged over the rows."""
    batch = filled_batch(True, False, True)
    odds = torch.ones(9, 10)
    odds[range(9), [6, 7, 8] * 3] = torch.tensor([1.0, 3, 5, 7, 9, 11, 13, 15, 17])
    expected = [-math.log(odd / (odd + 9)) for odd in (1, 3, 5, 7, 9, 11, 13, 15, 17)]
    assert loss(odds.log(), batch, OPUT).loss.item() == pytest.approx(sum(expected) / 9)


def test_a_student_with_an_adapter_fills_with_its_own_predictions() -> None:
    """Those of the adapter, without dropout; and gradients flow through the filled canvas."""
    student = attach(random_model(), LoraSettings(rank=4, alpha=4, dropout=0.5))
    torch.manual_seed(0)
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.5)
    rng = np.random.default_rng(0)
    prompts, responses = [rng.integers(3, 20, 4), rng.integers(3, 20, 3)], rng.integers(3, 20, (2, 6))
    recipe = OPUT.model_copy(update={"own_tokens": 1.0})
    views = [make_views(recipe, response, np.arange(6), (EOS,), rng) for response in responses]
    batch = make_batch(prompts, responses, views, MASK)
    student.train()
    made = with_own_tokens(student, batch, MASK)
    student.eval()
    with torch.no_grad():
        logits = student(**batch.full_inputs)
    logits[:, MASK] = -torch.inf
    expected = torch.where(batch.fill[batch.read], logits.argmax(-1), batch.targets)
    assert made.canvas[batch.read].tolist() == expected.tolist()
    loss(student(**made.student_inputs), made, recipe).loss.backward()
    assert all(weight.grad.abs().max() > 0 for name, weight in student.named_parameters() if "lora_B" in name)
