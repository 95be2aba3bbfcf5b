"""Commit rules against numbers worked by hand."""

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dparallel.decoding.blocks import best
from dparallel.decoding.predictions import choose, predict
from dparallel.rules.declaration import Context, Parameter, Prediction, RuleError, Weights
from dparallel.rules.features import FEATURES, features
from dparallel.rules.rules import RULES, rule
from tests.dparallel.rules.fitted import random_commit_rule


def certain_as(values):
    """A prediction in which `values` are both probabilities and entropies."""
    values = torch.tensor([values])
    nothing = values[..., None]
    return Prediction(torch.zeros_like(values).long(), values, values, 1 - values, nothing, nothing)


def committed(rule, values, masked, threshold=None, **given):
    """What `rule` commits if `values` are both probabilities and entropies."""
    return run(
        rule,
        certain_as(values),
        masked,
        **({"threshold": threshold} if threshold is not None else {}),
        **given,
    )


def commit(rule, parameters, prediction, masked, context):
    """The score, and what is committed in sequential decoding: what the rule selects, and the best one."""
    score, chosen = choose(rule, parameters, prediction, masked, context)
    must = best(score.numpy(), masked.numpy())
    return score, chosen if RULES[rule].whole_response else chosen | torch.from_numpy(must)


def run(rule, prediction, masked, **given):
    """What a rule commits: `given` are its parameters and parts of the context."""
    parameters = {name: given.pop(name) for name in RULES[rule].parameters}
    _, fixed = commit(rule, parameters, prediction, torch.tensor([masked]).bool(), Context(**given))
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


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.5, [0, 1, 0, 1, 0, 0]),  # the first is committed already; 0.25 ends the run
        (0.25, [0, 1, 0, 1, 1, 1]),
        (0.9, [0, 1, 0, 0, 0, 0]),  # nothing reaches it: the leftmost masked one
        (0.0, [0, 1, 0, 1, 1, 1]),
    ],
)
def test_contiguous_ends_at_the_first_unsure_token(threshold, expected):
    """Committed positions do not interrupt the run."""
    probability = [0.125, 0.625, 0.125, 0.875, 0.25, 0.875]
    assert committed("contiguous", probability, [0, 1, 0, 1, 1, 1], threshold) == expected


@pytest.mark.parametrize("rule", ["confidence", "margin", "steps", "entropy"])
def test_the_surest_of_sure_tokens_is_found(rule):
    """Probabilities 1 - 1e-9 and 1 - 1e-12 are both 1 in float32; neither reaches a threshold of 1."""
    logits = torch.tensor([[[0.0, -20.7, -40, -99], [0.0, -27.6, -40, -99], [0.0, -20.7, -40, -99]]])
    prediction = predict(logits, mask_token_id=3)
    assert prediction.probability.tolist() == [[1, 1, 1]]
    assert prediction.doubt[0].tolist() == pytest.approx([1.02e-9, 1.03e-12, 1.02e-9], rel=0.01)
    assert prediction.entropy[0].tolist() == pytest.approx([2.2e-8, 2.95e-11, 2.2e-8], rel=0.02)
    given = {"threshold": 0.0 if rule == "entropy" else 1.0}
    if rule == "steps":
        given = {"steps": 3, "block_length": 3, "block_forwards": torch.tensor([0])}
    fixed = run(rule, prediction, [1, 1, 1], mask_token_id=3, **given)
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
    ("bound", "expected"),
    [
        (0.0, [0, 0, 0, 1, 0]),  # one alone has no others
        (0.125, [1, 0, 0, 1, 0]),  # 0.125 and 0.25: all but the largest sum to 0.125, exactly
        (0.25, [1, 0, 0, 1, 0]),
        (0.375, [1, 0, 1, 1, 0]),  # 0.125 + 0.25, and 0.5 is free
        (0.75, [1, 0, 1, 1, 0]),
        (0.875, [1, 0, 1, 1, 1]),  # 0.125 + 0.25 + 0.5, and 1.0 is free
    ],
)
def test_entropy_bound_leaves_the_largest_out(bound, expected):
    """As many as a budget admits, and one more; a committed position of entropy 0 does not count."""
    assert committed("entropy_bound", [0.25, 0.0, 0.5, 0.125, 1.0], [1, 0, 1, 1, 1], bound) == expected


def test_small_entropies_count_beside_large_ones():
    """1e-9 + 2 is 2 in float32: the bound is a sum without the largest, not a difference of sums."""
    assert committed("entropy_bound", [2.0, 1e-9, 3.0], [1, 1, 1], 0.0) == [0, 1, 0]
    assert committed("entropy_bound", [2.0, 1e-9, 3.0], [1, 1, 1], 1e-8) == [1, 1, 0]


@pytest.mark.parametrize(
    ("delta", "expected"),
    [
        (0.0, [1, 0, 1, 1, 0]),  # doubts 1/16, 1/8, 1/4: sum 7/16 + 1/4 = 11/16 < 1; 15/16 + 1/2 is not
        (0.25, [1, 0, 1, 1, 0]),  # 11/16 < 12/16
        (0.3125, [1, 0, 0, 1, 0]),  # 11/16 is not below 11/16; 3/16 + 1/8 is
        (0.6875, [0, 0, 0, 1, 0]),  # 5/16 is not below 5/16
        (0.9375, [0, 0, 0, 1, 0]),  # 2/16 is not below 1/16: only the best one
        (1.0, [0, 0, 0, 1, 0]),
    ],
)
def test_frechet_bounds_the_joint_probability(delta, expected):
    """A committed position of probability 1 neither counts nor is committed again."""
    probability = [0.875, 1.0, 0.75, 0.9375, 0.5]
    assert committed("frechet", probability, [1, 0, 1, 1, 1], delta) == expected


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (0.0, [0, 0, 0, 1, 0]),  # only the best one
        (0.125, [0, 0, 0, 1, 0]),  # 2/16 is not below 2/16
        (0.375, [0, 0, 0, 1, 0]),  # 2/16, and 3/8 is not below 3/8
        (0.5, [1, 0, 0, 1, 0]),  # 3/8, and 4/4 is not below
        (1.0, [1, 0, 0, 1, 0]),
        (1.5, [1, 0, 1, 1, 0]),  # 4/4, and 5/2 is not below
        (3.0, [1, 0, 1, 1, 1]),
    ],
)
def test_factor_multiplies_the_doubt_with_the_number(limit, expected):
    """Doubts 1/16, 1/8, 1/4 and 1/2 times 2, 3, 4 and 5."""
    probability = [0.875, 1.0, 0.75, 0.9375, 0.5]
    assert committed("factor", probability, [1, 0, 1, 1, 1], limit) == expected


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
    schedule = {"steps": 3, "block_length": 8}
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
        schedule = {"steps": steps, "block_forwards": torch.tensor([step])}
        return run(rule, prediction, masked, mask_token_id=3, **schedule)

    one, two = [0, 0, 0], [0, 0, 0]
    one[first] = two[first] = two[second] = 1
    assert fixed(4, 0, [1, 1, 1]) == [0, 0, 0]
    assert fixed(2, 0, [1, 1, 1]) == one  # int(3 * 0.4995)
    assert fixed(6, 4, [1, 1, 1]) == one  # int(3 * (1 - 0.1675 / 0.334))
    assert fixed(8, 6, [1, 1, 1]) == one
    assert fixed(4, 3, [1, 1, 0]) == [1, 1, 0]
    assert fixed(4, 3, [1, 1, 1]) == [1, 1, 1]


FITTED = random_commit_rule().weights
CUMULATIVE = ("entropy_budget", "entropy_bound", "frechet", "factor")
CAUTIOUS = (
    "confidence",
    "contiguous",
    "margin",
    "stability",
    "frechet",
    "learned",
)  # a larger threshold commits fewer tokens
distributions = st.lists(st.lists(st.floats(-9, 9), min_size=5, max_size=5), min_size=4, max_size=4)


@given(
    st.sampled_from([name for name, rule in RULES.items() if "threshold" in rule.parameters]),
    st.lists(distributions, min_size=1, max_size=3),
    st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=3, max_size=3),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_every_row_commits_alone_at_least_one_and_no_fewer_where_the_threshold_is_laxer(
    rule, logits, masked, one, other
):
    masked = torch.tensor(masked[: len(logits)])
    strict, lax = sorted((one, other), reverse=rule in CAUTIOUS)

    def commits(threshold, rows):
        prediction = predict(torch.tensor(logits)[rows], mask_token_id=4)
        seen = torch.ones_like(masked[rows])
        context = Context(
            block_length=4,
            mask_token_id=4,
            previous=prediction.log_probability,
            seen=seen,
            offsets=torch.arange(4).expand(len(seen), -1),
            weights=FITTED,
        )
        parameters = {**RULES[rule].settings, "threshold": threshold}
        selected = choose(rule, parameters, prediction, masked[rows], context).chosen
        score, fixed = commit(rule, parameters, prediction, masked[rows], context)
        assert (fixed.any(1) == masked[rows].any(1)).all()
        assert not (fixed & ~masked[rows]).any()
        if rule in CUMULATIVE:  # a prefix of the ranking
            worst = score.masked_fill(~selected, torch.inf).amin(1)
            best_left = score.masked_fill(selected | ~masked[rows], -torch.inf).amax(1)
            assert (worst >= best_left).all()
        return fixed

    whole = commits(strict, slice(None))
    for row in range(len(logits)):
        assert torch.equal(commits(strict, slice(row, row + 1))[0], whole[row])
    assert (whole <= commits(lax, slice(None))).all()


def logistic(bias: float, **weights: float) -> Weights:
    """A commit rule without hidden layer that has these weights of features, and 0 for the others."""
    row = [weights.pop(name, 0.0) for name in FEATURES]
    assert not weights
    return Weights(((torch.tensor([row]).double(), torch.tensor([bias]).double()),))


def test_learned_reads_certainty_and_place_in_the_block():
    """Two blocks of 4, with masks at 1 and 3, and at 4, 5 and 7; the last one read is no mask."""
    prediction = from_probabilities([[0.5, 0.25, 0.125, 0.125]] * 6)
    masked, offsets = torch.tensor([[True] * 5 + [False]]), torch.tensor([[1, 3, 4, 5, 7, 0]])
    context = Context(blocks=2, block_length=4, mask_token_id=3, offsets=offsets)
    found = features(prediction, torch.full((1, 6), 0.25), masked, context)[0, :5]
    columns = dict(zip(FEATURES, found.T.tolist(), strict=True))
    entropy = 0.5 * math.log(2) + 0.25 * math.log(4) + 2 * 0.125 * math.log(8)
    assert columns["log_doubt"] == pytest.approx([math.log(0.5)] * 5)
    assert columns["log_entropy"] == pytest.approx([math.log(entropy)] * 5)
    assert columns["log_runner_up"] == pytest.approx([math.log(0.25)] * 5)
    assert columns["position"] == [0.25, 0.75, 0.0, 0.25, 0.75]
    assert columns["committed"] == [0.5, 0.5, 0.25, 0.25, 0.25]
    assert columns["masked_before"] == [0.0, 0.25, 0.0, 0.25, 0.5]


@pytest.mark.parametrize(
    ("weights", "threshold", "expected"),
    [
        (
            logistic(0.0, log_doubt=-1.0),
            0.75,
            [0, 0, 1, 0],
        ),  # 1 / (1 + doubt) of 1/2, 1/4, 1/8: 0.67, 0.8, 0.89
        (logistic(0.0, log_doubt=-1.0), 0.6, [1, 0, 1, 0]),
        (logistic(1.0, masked_before=-4.0), 0.5, [1, 0, 1, 0]),  # logits 1, and 0 after one of 4: exactly 1/2
        (logistic(1.0, masked_before=-4.0), 0.51, [1, 0, 0, 0]),
        (logistic(-9.0), 0.5, [1, 0, 0, 0]),  # nothing is final: only the best one, here the first
    ],
)
def test_learned_commits_by_its_own_probability(weights, threshold, expected):
    rows = [[0.5, 0.5, 0, 0], [0.75, 0.25, 0, 0], [0.875, 0.125, 0, 0], [0.25, 0.25, 0.5, 0]]
    given = {"blocks": 1, "block_length": 4, "mask_token_id": 3, "offsets": torch.arange(4)[None]}
    fixed = run(
        "learned", from_probabilities(rows), [1, 0, 1, 0], threshold=threshold, weights=weights, **given
    )
    assert fixed == expected


def test_every_rule_says_what_it_commits_and_what_its_parameters_are():
    for name, declared in RULES.items():
        assert declared.choose.__doc__, name
        assert declared.choose.__kwdefaults__ is None
        keywords = inspect.getfullargspec(declared.choose).kwonlyargs
        assert keywords == list(declared.parameters), name
        assert all(parameter.meaning for parameter in declared.parameters.values())


def test_declarations_that_cannot_be() -> None:
    known = Parameter(meaning="anything")
    with pytest.raises(
        RuleError, match="rule 'entropy' exists: choose another name for the function in .*test_"
    ):

        @rule(threshold=known)
        def entropy(prediction, masked, context, *, threshold): ...

    for declared, takes in (
        ({"thresold": known}, "declares thresold, and .* takes threshold"),
        ({}, "no param"),
    ):
        with pytest.raises(RuleError, match=f"rule 'misspelt' .*{takes}.* make them the same"):

            @rule(**declared)
            def misspelt(prediction, masked, context, *, threshold): ...

    assert "misspelt" not in RULES
