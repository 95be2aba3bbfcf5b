"""Commit rules against numbers worked by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dparallel.config.decoding import DecodingConfig
from dparallel.config.rules import RULES
from dparallel.decoding.rules import CHOOSERS, Prediction, Setting, best, commit, predict
from dparallel.decoding.sampling import uniform


def committed(rule, score, masked, threshold=None, **setting):
    """What `rule` commits if `score` is both probability and entropy."""
    values = torch.tensor([score])
    nothing = values[..., None]
    prediction = Prediction(torch.zeros_like(values).long(), values, values, 1 - values, nothing, nothing)
    return run(rule, prediction, masked, threshold=threshold, **setting)


def run(rule, prediction, masked, **setting):
    fixed, _ = commit(rule, prediction, torch.tensor([masked]).bool(), Setting(**setting))
    return fixed[0].int().tolist()


def from_probabilities(rows):
    """A prediction over tokens 0, 1, 2, 3 (the mask), one position each row."""
    return predict(torch.tensor([rows]).log(), mask_token_id=3)


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.5, [1, 0, 1, 0]), (0.95, [0, 0, 1, 0]), (0.625, [1, 0, 1, 0]), (0.0, [1, 0, 1, 1])],
)
def test_confidence(threshold, expected):
    assert committed("confidence", [0.625, 0.99, 0.875, 0.125], [1, 0, 1, 1], threshold) == expected


@pytest.mark.parametrize("rule", ["confidence", "margin", "steps", "entropy"])
def test_the_surest_of_sure_tokens_is_found(rule):
    """Probabilities 1 - 1e-9 and 1 - 1e-12 are both 1 in float32; neither reaches a threshold of 1."""
    logits = torch.tensor([[[0.0, -20.7, -40, -99], [0.0, -27.6, -40, -99], [0.0, -20.7, -40, -99]]])
    prediction = predict(logits, mask_token_id=3)
    assert prediction.probability.tolist() == [[1, 1, 1]]
    assert prediction.doubt[0].tolist() == pytest.approx([1.02e-9, 1.03e-12, 1.02e-9], rel=0.01)
    assert prediction.entropy[0].tolist() == pytest.approx([2.2e-8, 2.95e-11, 2.2e-8], rel=0.02)
    schedule = {"steps_per_block": 3, "block_length": 3, "block_forwards": torch.tensor([0])}
    threshold = 0.0 if rule == "entropy" else 1.0
    fixed = run(rule, prediction, [1, 1, 1], threshold=threshold, mask_token_id=3, **schedule)
    assert fixed == [0, 1, 0]


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.5, [0, 0, 1, 1]), (0.25, [0, 0, 1, 0]), (0.0, [0, 0, 1, 0])]
)
def test_entropy(threshold, expected):
    assert committed("entropy", [0.6, 0.01, 0.25, 0.5], [1, 0, 1, 1], threshold) == expected


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (0.0, [0, 0, 0, 1, 0]),  # nothing fits: only the best one
        (0.25, [0, 0, 0, 1, 0]),  # 0.125 fits, 0.125 + 0.25 does not
        (0.375, [1, 0, 0, 1, 0]),
        (0.875, [1, 0, 1, 1, 0]),  # 0.125 + 0.25 + 0.5, exactly
        (9.0, [1, 0, 1, 1, 1]),
    ],
)
def test_entropy_budget_takes_the_surest_whose_sum_fits(budget, expected):
    """A committed position of entropy 0 neither counts nor is committed again."""
    assert committed("entropy_budget", [0.25, 0.0, 0.5, 0.125, 1.0], [1, 0, 1, 1, 1], budget) == expected


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.7, [0, 1, 0]), (0.35, [1, 1, 0]), (0.05, [1, 1, 0]), (0.0, [1, 1, 1])]
)
def test_margin_is_the_lead_over_the_next_token(threshold, expected):
    """Leads 0.4, 0.6 and 0: the mask token's 0.5 in the last row does not compete."""
    prediction = from_probabilities(
        [[0.6, 0.2, 0.1, 0.1], [0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 1e-9, 0.5]],
    )
    assert run("margin", prediction, [1, 1, 1], threshold=threshold, mask_token_id=3) == expected


@pytest.mark.parametrize(
    ("threshold", "stability_threshold", "seen", "expected"),
    [
        (0.5, 0.1, [1, 1, 1], [1, 0, 1]),  # KL 0, 0.35 and 0.08
        (0.5, 0.34, [1, 1, 1], [1, 0, 1]),
        (0.5, 0.4, [1, 1, 1], [1, 1, 1]),
        (0.85, 0.4, [1, 1, 1], [0, 0, 1]),  # stable but uncertain is not enough
        (0.5, 0.4, [0, 0, 0], [0, 0, 1]),  # without previous reading: only the best one
    ],
)
def test_stability_asks_what_moved(threshold, stability_threshold, seen, expected):
    now = [[0.8, 0.1, 0.05, 0.05], [0.8, 0.1, 0.05, 0.05], [0.9, 0.05, 0.03, 0.02]]
    before = [[0.8, 0.1, 0.05, 0.05], [0.4, 0.4, 0.1, 0.1], [0.75, 0.1, 0.1, 0.05]]
    divergence = [
        sum(p * math.log(p / q) for p, q in zip(*rows, strict=True)) for rows in zip(now, before, strict=True)
    ]
    assert divergence == pytest.approx([0, 0.3466, 0.0750], abs=1e-4)
    fixed = run(
        "stability",
        from_probabilities(now),
        [1, 1, 1],
        threshold=threshold,
        stability_threshold=stability_threshold,
        previous=torch.tensor([before]).log(),
        seen=torch.tensor([seen]).bool(),
    )
    assert fixed == expected


def test_steps_spend_the_remainder_first():
    """Eight positions in three forward passes: 3, 3, 2."""
    score = [0.1, 0.8, 0.3, 0.7, 0.2, 0.6, 0.5, 0.4]
    masked = [1] * 8
    counts = []
    schedule = {"steps_per_block": 3, "block_length": 8}
    for step in range(3):
        chosen = committed("steps", score, masked, **schedule, block_forwards=torch.tensor([step]))
        counts.append(sum(chosen))
        masked = [m - c for m, c in zip(masked, chosen, strict=True)]
    assert counts == [3, 3, 2]
    first = committed("steps", score, [1] * 8, **schedule, block_forwards=torch.tensor([0]))
    assert first == [0, 1, 0, 1, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("rule", "first", "second"),
    [("dream_entropy", 2, 0), ("dream_maskgit_plus", 2, 1), ("dream_topk_margin", 2, 1)],
)
def test_dreams_sampler_takes_its_share_of_the_masks(rule, first, second):
    """Four steps from 1 to 0.001 take int(3 * 0.25) = 0, then int(3 * 0.333) = 0 or 1 of 3 masks, ..., all.

    The last position is best by all scores; the second is the lower entropy (0) or the more likely token (1).
    """
    prediction = from_probabilities(
        [[0.55, 0.449, 0.0005, 0.0005], [0.6, 0.14, 0.13, 0.13], [0.9, 0.05, 0.03, 0.02]]
    )

    def fixed(steps, step, masked):
        schedule = {"steps_per_block": steps, "block_forwards": torch.tensor([step])}
        return run(rule, prediction, masked, mask_token_id=3, **schedule)

    one, two = [0, 0, 0], [0, 0, 0]
    one[first] = two[first] = two[second] = 1
    assert fixed(4, 0, [1, 1, 1]) == [0, 0, 0]
    assert fixed(2, 0, [1, 1, 1]) == one  # int(3 * 0.4995)
    assert fixed(6, 4, [1, 1, 1]) == one  # int(3 * (1 - 0.1675 / 0.334))
    assert fixed(8, 6, [1, 1, 1]) == one
    assert fixed(4, 3, [1, 1, 0]) == [1, 1, 0]
    assert fixed(4, 3, [1, 1, 1]) == [1, 1, 1]


def test_best_is_the_first_of_the_highest_among_the_candidates():
    score = torch.tensor([[1.0, 5.0, 3.0, 3.0], [1.0, 2.0, 3.0, 4.0]])
    among = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0]]).bool()
    assert best(score, among).int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 0]]


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


def test_every_rule_has_a_function_and_its_settings():
    assert list(CHOOSERS) == list(RULES)
    for rule in RULES.values():
        assert set(rule.defaults) <= set(DecodingConfig.model_fields)
