"""The oracle compared with the published loops and with numbers worked by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dparallel import DecodingConfig
from dparallel.decoding import oracle
from dparallel.decoding.oracle import Reading, decode_one
from dparallel.rules.rules import RULES
from tests.conftest import random_model
from tests.dparallel.decoding.golden_cases import CASES, assert_agrees, decoding_of

MODELS = [random_model(seed) for seed in range(3)]


@pytest.mark.parametrize("kind", CASES)
def test_published_loops_give_the_same(llada_tiny, kind):
    for case in CASES[kind]:
        assert_agrees(decode_one(llada_tiny, case["prompt"], decoding_of(case)), case)


def test_reading_by_hand():
    """Probabilities 1/2, 1/4, 1/8, 1/8: entropy 7/4 ln 2; KL against the uniform distribution 1/4 ln 2."""
    now, uniform = torch.tensor([0.5, 0.25, 0.125, 0.125]), torch.full((4,), 0.25)
    reading = oracle.read(now, uniform, mask=0)
    assert reading[:6] == pytest.approx((1, 0.25, 0.75, 0.125, 1.75 * math.log(2), 0.25 * math.log(2)))
    assert oracle.read(now, None, mask=3)[:6] == pytest.approx(
        (0, 0.5, 0.5, 0.25, 1.75 * math.log(2), math.inf)
    )
    certain = torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert oracle.read(certain, certain, mask=3)[:6] == pytest.approx((1, 1, 0, 0, 0, 0))


READING = {
    2: Reading(token=7, probability=0.5, doubt=0.5, runner_up=0.2, entropy=1.0, drift=0.0),
    3: Reading(token=7, probability=0.9, doubt=0.1, runner_up=0.7, entropy=0.5, drift=0.2),
    5: Reading(token=7, probability=0.9, doubt=0.1, runner_up=0.1, entropy=0.25, drift=math.inf),
    6: Reading(token=7, probability=0.7, doubt=0.3, runner_up=0.2, entropy=0.5, drift=0.1),
}


@pytest.mark.parametrize(
    ("rule", "limits", "ranking", "chosen"),
    [
        ("confidence", {"threshold": 0.7}, [3, 5, 6, 2], [3, 5, 6]),
        ("confidence", {"threshold": 0.95}, [3, 5, 6, 2], []),
        ("contiguous", {}, [2, 3, 5, 6], [2, 3, 5, 6]),
        ("contiguous", {"threshold": 0.6}, [2, 3, 5, 6], []),
        ("entropy", {"threshold": 0.5}, [5, 3, 6, 2], [5, 3, 6]),
        ("entropy_budget", {"threshold": 0.75}, [5, 3, 6, 2], [5, 3]),
        ("entropy_budget", {"threshold": 1.25}, [5, 3, 6, 2], [5, 3, 6]),
        ("entropy_budget", {"threshold": 0.2}, [5, 3, 6, 2], []),
        ("entropy_bound", {"threshold": 0.2}, [5, 3, 6, 2], [5]),
        ("entropy_bound", {"threshold": 0.25}, [5, 3, 6, 2], [5, 3]),
        ("entropy_bound", {"threshold": 0.75}, [5, 3, 6, 2], [5, 3, 6]),
        ("entropy_bound", {"threshold": 1.25}, [5, 3, 6, 2], [5, 3, 6, 2]),
        ("frechet", {"threshold": 0.25}, [3, 5, 6, 2], [3, 5]),  # 0.2 + 0.1; 0.5 + 0.3 is not below 0.75
        ("frechet", {"threshold": 0.15}, [3, 5, 6, 2], [3, 5, 6]),
        ("frechet", {"threshold": 0.85}, [3, 5, 6, 2], []),
        ("factor", {}, [3, 5, 6, 2], [3, 5]),  # 3 * 0.1; 4 * 0.3 is not below 1
        ("factor", {"threshold": 1.3}, [3, 5, 6, 2], [3, 5, 6]),
        ("factor", {"threshold": 0.2}, [3, 5, 6, 2], []),
        ("margin", {"threshold": 0.3}, [5, 6, 2, 3], [5, 6, 2]),
        ("stability", {"threshold": 0.6, "stability_threshold": 0.2}, [3, 5, 6, 2], [3, 6]),
        ("stability", {"threshold": 0.5, "stability_threshold": 1e-3}, [3, 5, 6, 2], [2]),
    ],
)
def test_rules_by_hand(rule, limits, ranking, chosen):
    decoding = DecodingConfig(gen_length=8, block_length=8, rule=rule, **limits)
    assert oracle.rank(rule, READING) == ranking
    assert oracle.selected(decoding, READING, ranking, 0) == chosen


def test_every_rule_is_defined():
    assert list(oracle.DEFINITIONS) == list(RULES)


def test_steps_by_hand():
    """Eight positions in three forward passes: 3, 3, 2."""
    decoding = DecodingConfig(gen_length=16, block_length=8, rule="steps", steps=6)
    assert [len(oracle.selected(decoding, READING, [2, 3, 5, 6], each)) for each in range(3)] == [3, 3, 2]


def multi_block(cache, **settings):
    return DecodingConfig(gen_length=6, block_length=2, mode="multi_block", cache=cache, **settings)


@pytest.mark.parametrize(
    ("commit_step", "opened_at", "nfe", "dual", "prefix"),
    [
        ([-1] * 6, [0], 0, range(10), range(10)),
        ([0, -1, -1, -1, -1, -1], [0], 1, [4, 5], range(4, 10)),
        ([0, 1, 2, -1, -1, -1], [0, 1], 3, [4, 5, 6, 7], range(4, 10)),  # settles twice
        ([0, 1, 2, -1, -1, -1], [0, 1], 4, [6, 7], range(6, 10)),
        ([3, 2, 0, 1, -1, -1], [0, 1, 2], 4, [4, 5, 8, 9], range(4, 10)),  # the middle one settled first
        ([0, 1, 2, -1, -1, -1], [0, 1], 5, range(10), range(10)),  # refreshed every 5
    ],
)
def test_recomputed_positions_by_hand(commit_step, opened_at, nfe, dual, prefix):
    """A prompt of 4, then blocks at 4, 6 and 8."""
    for cache, expected in (("dual", dual), ("prefix", prefix), ("none", range(10))):
        cached = {} if cache == "none" else {"settle_rounds": 2, "refresh_every": 5}
        decoding = multi_block(cache, **cached)
        assert oracle._recomputed(decoding, 4, commit_step, opened_at, nfe) == list(expected)


def test_a_sequential_cache_is_filled_where_a_block_starts():
    for cache, later in (("dual", [6, 7]), ("prefix", [6, 7, 8, 9])):
        decoding = DecodingConfig(gen_length=6, block_length=2, cache=cache)
        commit_step = [0, 1, -1, -1, -1, -1]
        assert oracle._recomputed(decoding, 4, commit_step, [0, 2], 2) == list(range(10))
        assert oracle._recomputed(decoding, 4, [*commit_step[:2], 2, *commit_step[3:]], [0, 2], 3) == later


@pytest.mark.parametrize("shape", [{}, {"num_key_value_heads": 2, "qkv_bias": True, "rope_theta": 500.0}])
def test_forward_by_hand_equals_the_model(shape):
    """A fully recomputed canvas equals the model; a partly recomputed one equals a full computation in which
    the other positions hold their old tokens."""
    model = random_model(3, num_hidden_layers=1, **shape)
    for bias in (module.bias for module in model.modules() if isinstance(module, torch.nn.Linear)):
        if bias is not None:
            torch.nn.init.normal_(bias)
    old, new = [5, 6, 1, 1, 9], [5, 6, 7, 1, 8]
    memory: oracle.KeyValues = [{} for _ in model.layers]
    with torch.no_grad():
        logits = oracle.forward(model, old, list(range(5)), memory)
        assert torch.allclose(torch.stack(list(logits.values())), model(torch.tensor([old]))[0], atol=1e-5)
        # With one layer, an entry depends on its own token only, so position 4 may hold its old token.
        logits = oracle.forward(model, new, [2, 3], memory)
        expected = model(torch.tensor([[*new[:4], old[4]]]))[0]
    assert list(logits) == [2, 3]
    assert torch.allclose(torch.stack(list(logits.values())), expected[2:4], atol=1e-5)


prompts = st.lists(st.integers(2, 49), min_size=1, max_size=12)


@given(prompts, st.sampled_from(MODELS), st.floats(0, 3), st.booleans())
def test_multi_block_at_full_shares_is_sequential(prompt, model, threshold, stop_at_eos):
    shape = {"gen_length": 16, "block_length": 4, "threshold": threshold, "stop_at_eos": stop_at_eos}
    whole = {"block_add_threshold": 1.0, "decoded_token_threshold": 1.0}
    sequential = decode_one(model, prompt, DecodingConfig(**shape))
    assert decode_one(model, prompt, DecodingConfig(**shape, mode="multi_block", **whole)) == sequential


@given(prompts, st.sampled_from(MODELS), st.floats(0, 3), st.sampled_from(["prefix", "dual"]))
def test_a_cache_refreshed_at_every_forward_is_exact(prompt, model, threshold, cache):
    shape = {"gen_length": 16, "block_length": 4, "threshold": threshold, "mode": "multi_block"}
    exact = decode_one(model, prompt, DecodingConfig(**shape))
    refreshed = decode_one(model, prompt, DecodingConfig(**shape, cache=cache, refresh_every=1))
    assert (refreshed.tokens, refreshed.commit_step) == (exact.tokens, exact.commit_step)
    assert refreshed.confidence == pytest.approx(exact.confidence, abs=1e-5)


def test_it_draws_no_tokens():
    decoding = DecodingConfig(gen_length=8, block_length=8, temperature=0.5)
    with pytest.raises(
        ValueError, match=r"temperature=0\.5: the oracle draws no tokens; set temperature to 0"
    ):
        decode_one(MODELS[0], [5], decoding)
