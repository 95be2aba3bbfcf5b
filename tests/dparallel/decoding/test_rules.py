"""Commit rules against numbers worked by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dparallel.config import Rule
from dparallel.decoding.rules import RULES, BlockStep, Prediction, predict
from dparallel.decoding.sampling import uniform


def commit(rule, score, masked, threshold=None, steps_per_block=None, step=0):
    score = torch.tensor([score])
    prediction = Prediction(torch.zeros_like(score).long(), score, score)
    at = BlockStep(threshold, steps_per_block, torch.tensor([step]))
    return RULES[rule](prediction, torch.tensor([masked]).bool(), at)[0].int().tolist()


def test_registry_and_config_name_the_same_rules():
    assert set(RULES) == set(Rule.__args__)


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.5, [1, 0, 1, 0]), (0.95, [0, 0, 1, 0]), (0.9, [0, 0, 1, 0]), (0.0, [1, 0, 1, 1])],
)
def test_confidence(threshold, expected):
    assert commit("confidence", [0.6, 0.99, 0.9, 0.1], [1, 0, 1, 1], threshold) == expected


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.5, [0, 0, 1, 1]), (0.25, [0, 0, 1, 0]), (0.0, [0, 0, 1, 0])]
)
def test_entropy(threshold, expected):
    assert commit("entropy", [0.6, 0.01, 0.25, 0.5], [1, 0, 1, 1], threshold) == expected


def test_steps_spend_the_remainder_first():
    """Eight positions in three forwards: 3, 3, 2."""
    score = [0.1, 0.8, 0.3, 0.7, 0.2, 0.6, 0.5, 0.4]
    masked = [1] * 8
    counts = []
    for step in range(3):
        chosen = commit("steps", score, masked, steps_per_block=3, step=step)
        counts.append(sum(chosen))
        masked = [m - c for m, c in zip(masked, chosen, strict=True)]
    assert counts == [3, 3, 2]
    assert commit("steps", score, [1] * 8, steps_per_block=3) == [0, 1, 0, 1, 0, 1, 0, 0]


def test_predict_by_hand():
    """Three tokens of probability 1/2, 1/4, 1/4: entropy 1.5 ln 2; the mask (id 0) is passed over."""
    prediction = predict(torch.tensor([[[2.0, 1.0, 1.0]]]) * math.log(2), mask_token_id=0)
    assert prediction.token.item() == 1
    assert prediction.probability.item() == pytest.approx(0.25)
    assert prediction.entropy.item() == pytest.approx(1.5 * math.log(2))


def test_impossible_tokens_do_not_spoil_the_entropy():
    prediction = predict(torch.tensor([[[0.0, 0.0, -torch.inf]]]), mask_token_id=2)
    assert prediction.entropy.item() == pytest.approx(math.log(2))


def test_predict_draws_by_probability_within_the_nucleus():
    """Probabilities 0.5, 0.3, 0.2: top_p 0.7 keeps the first two, which then share as 5 : 3."""
    draws = 20_000
    logits = torch.tensor([0.5, 0.3, 0.2, 1e-9]).log().expand(draws, 1, 4)
    numbers = uniform(torch.arange(draws), torch.zeros(draws).long(), torch.zeros(draws, 1).long(), 4)
    everything = predict(logits, 3, 1.0, None, numbers).token.flatten().bincount(minlength=4) / draws
    nucleus = predict(logits, 3, 1.0, 0.7, numbers).token.flatten().bincount(minlength=4) / draws
    assert everything.tolist() == pytest.approx([0.5, 0.3, 0.2, 0], abs=0.015)
    assert nucleus.tolist() == pytest.approx([0.625, 0.375, 0, 0], abs=0.015)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 1000))
def test_uniform_numbers_are_a_function_of_their_place(seed, step):
    rows = uniform(torch.tensor([seed, 7]), torch.tensor([step, 3]), torch.tensor([[4, 9], [9, 4]]), 5)
    alone = uniform(torch.tensor([seed]), torch.tensor([step]), torch.tensor([[9]]), 5)
    assert torch.equal(rows[0, 1], alone[0, 0])
    assert ((rows > 0) & (rows < 1)).all()


def test_uniform_numbers_are_uniform_and_uncorrelated():
    numbers = uniform(torch.arange(40), torch.zeros(40).long(), torch.arange(25).expand(40, 25), 20).double()
    assert numbers.mean().item() == pytest.approx(0.5, abs=0.01)
    assert numbers.var().item() == pytest.approx(1 / 12, abs=0.005)
    for one, other in (
        (numbers[1:], numbers[:-1]),
        (numbers[:, 1:], numbers[:, :-1]),
        (numbers[..., 1:], numbers[..., :-1]),
    ):
        assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 0.03
