"""Predictions and draws against numbers worked by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dparallel.decoding.predictions import predict
from dparallel.decoding.sampling import uniform


def test_predict_by_hand():
    """Three tokens of probability 1/2, 1/4, 1/4: entropy 1.5 ln 2; the mask (id 0) is never predicted."""
    prediction = predict(torch.tensor([[[2.0, 1.0, 1.0]]]) * math.log(2), mask_token_id=0)
    assert prediction.token.item() == 1
    assert prediction.probability.item() == pytest.approx(0.25)
    assert prediction.entropy.item() == pytest.approx(1.5 * math.log(2))


def test_impossible_tokens_do_not_spoil_the_entropy():
    prediction = predict(torch.tensor([[[0.0, 0.0, -torch.inf]]]), mask_token_id=2)
    assert prediction.entropy.item() == pytest.approx(math.log(2))


def test_predict_draws_by_probability_within_the_nucleus():
    """Probabilities 0.5, 0.3, 0.2: top_p 0.7 keeps the first two, which are then sampled as 5 : 3."""
    draws = 20_000
    logits = torch.tensor([0.5, 0.3, 0.2, 1e-9]).log().expand(draws, 1, 4)
    numbers = uniform(torch.arange(draws), torch.zeros(draws).long(), torch.zeros(draws, 1).long(), 4)
    everything = predict(logits, 3, 1.0, None, numbers).token.flatten().bincount(minlength=4) / draws
    nucleus = predict(logits, 3, 1.0, 0.7, numbers).token.flatten().bincount(minlength=4) / draws
    assert everything.tolist() == pytest.approx([0.5, 0.3, 0.2, 0], abs=0.015)
    assert nucleus.tolist() == pytest.approx([0.625, 0.375, 0, 0], abs=0.015)


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (1, None, [1, 0, 0, 0]),
        (2, None, [0.5, 0.25, 0.25, 0]),  # of equal tokens at the limit, all are kept
        (9, None, [0.4, 0.2, 0.2, 0.2]),  # more than there are
        (4, 0.5, [2 / 3, 1 / 3, 0, 0]),  # 0.4 + 0.2 reach 0.5: the smaller set counts
        (1, 0.5, [1, 0, 0, 0]),
    ],
)
def test_the_tokens_that_are_drawn_from_by_hand(top_k, top_p, expected):
    """Probabilities 0.4, 0.2, 0.2, 0.2; at top_k 2 the last one is a little lower."""
    last = 0.19 if top_k == 2 else 0.2
    logits = torch.tensor([[[0.4, 0.2, 0.2, last, 0.9]]]).log()  # the last is the mask
    prediction = predict(logits, 4, 1.0, top_p, torch.full_like(logits, 0.5), top_k=top_k)
    assert prediction.drawn_from.exp()[0, 0, :4].tolist() == pytest.approx(expected)
    assert prediction.token.item() == 0


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
