"""`generate` equals the oracle in every row, for all rules, modes and caches, independent of the batch."""

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dparallel import DecodingConfig, Generation, generate
from dparallel.config.modes import MODES
from dparallel.decoding import compiled
from dparallel.decoding.canvas import Step
from dparallel.decoding.denoise import denoise
from dparallel.decoding.oracle import decode_one
from dparallel.decoding.revising_oracle import revise_one
from dparallel.decoding.stops import Stop
from dparallel.models.backbone import DiffusionTransformer
from dparallel.rules.rules import RULES
from tests.conftest import random_model
from tests.dparallel.decoding.same import assert_same, choices, is_rounding
from tests.dparallel.rules.fitted import random_commit_rule

EOS = 2


def model_of(seed: int, **shape) -> DiffusionTransformer:
    """Random weights and biases, and a random commit rule."""
    model = random_model(seed, **shape)
    model.commit_rule = random_commit_rule(seed, hidden=3 * (seed % 2))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            torch.nn.init.normal_(module.bias)
    return model


# Seeds whose models commit an end-of-sequence token early in many rows, so that stopping is tested.
MODELS = [
    *(model_of(seed) for seed in range(3)),
    model_of(3, num_key_value_heads=2, qkv_bias=True),
    model_of(4, num_key_value_heads=1, num_hidden_layers=3),
    model_of(5, num_key_value_heads=2, qkv_bias=True, predicts_next=True),
]
CAUSAL = {"predicts_next": True, "attention_pattern": "causal"}
AUTOREGRESSIVE = {seed: model_of(seed, num_key_value_heads=2, **CAUSAL) for seed in (5, 7)}
THRESHOLDS = {  # in the range of these models' predictions, so that some positions are committed
    "confidence": st.floats(0.1, 0.5),
    "contiguous": st.floats(0.05, 0.4),
    "entropy": st.floats(1.5, 3.5),
    "entropy_budget": st.floats(2, 12),
    "entropy_bound": st.floats(0, 9),
    "frechet": st.floats(0, 1),
    "factor": st.floats(1, 6),
    "margin": st.floats(0, 0.3),
    "stability": st.floats(0, 0.3),
    "learned": st.floats(0.05, 0.95),
}


endings = st.sampled_from(
    [
        {},
        {"stop_at_eos": False},
        {"eos_fill": "immediate"},
        {"suppress_eos": True},
        {"suppress_eos": True, "eos_fill": "immediate"},  # of another end token
    ]
)


@st.composite
def decodings(draw, rule: str) -> DecodingConfig:
    chosen: dict[str, Any]
    ends = draw(endings)
    if RULES[rule].whole_response:
        chosen = {"gen_length": 24, "rule": rule, **ends}
        return DecodingConfig(**chosen, steps=draw(st.sampled_from([1, 3, 5, 8, 17, 24])))
    chosen = {
        "gen_length": 24,
        "block_length": draw(st.sampled_from([4, 8, 12])),
        "rule": rule,
        "cache": draw(st.sampled_from(["none", "prefix", "dual"])),
        **ends,
    }
    if rule == "steps":
        return DecodingConfig(**chosen, steps=draw(st.sampled_from([6, 12, 18, 24])))
    chosen["threshold"] = draw(THRESHOLDS[rule])
    if rule == "stability":
        chosen["stability_threshold"] = draw(st.floats(1e-4, 0.5))
    mode = draw(st.sampled_from(["sequential", "multi_block", "revising", "pipelined"]))
    if "eos_fill" not in MODES[mode].defaults:
        chosen.pop("eos_fill", None)
    if mode == "revising":
        chosen |= {"mode": mode, "final_threshold": draw(st.floats(0, 1))}
        chosen["revision_passes"] = draw(st.integers(0, 5))
    elif mode != "sequential":
        shares = st.floats(0.01, 1) | st.sampled_from([1 / 4, 5 / 12, 1])  # some are met exactly
        chosen |= {"mode": mode, "block_add_threshold": draw(shares), "decoded_token_threshold": draw(shares)}
        if mode == "pipelined":
            chosen["cache"] = draw(st.sampled_from(["none", "exact"]))
            chosen["block_length"] = draw(st.sampled_from([1, 2, 4, 8, 12]))
        elif chosen["cache"] != "none":
            chosen |= {
                "settle_rounds": draw(st.integers(1, 3)),
                "refresh_every": draw(st.integers(1, 9)),
            }
    return DecodingConfig(**chosen)


prompts = st.lists(st.lists(st.integers(2, 49), min_size=1, max_size=12), min_size=1, max_size=7)
batch_sizes = st.integers(1, 6)


@pytest.mark.parametrize("rule", RULES)
@given(st.data(), prompts, st.sampled_from(MODELS), batch_sizes)
def test_every_row_equals_the_oracle(rule, data, prompts, model, batch_size):
    decoding = data.draw(decodings(rule))
    for prompt, generation in zip(prompts, generate(model, prompts, decoding, batch_size), strict=True):
        assert_equals_the_oracle(generation, model, prompt, decoding)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
@given(st.data(), prompts, st.sampled_from(MODELS), batch_sizes)
def test_a_gpu_decodes_what_the_oracle_decodes_on_the_cpu(rule, data, prompts, model, batch_size):
    decoding = data.draw(decodings(rule))
    there = deepcopy(model).cuda()
    for prompt, generation in zip(prompts, generate(there, prompts, decoding, batch_size), strict=True):
        assert_equals_the_oracle(generation, model, prompt, decoding)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts,
    decodings("entropy").filter(
        lambda each: each.mode in ("multi_block", "revising") and each.cache != "none"
    ),
    st.sampled_from(MODELS),
    st.integers(2, 6),
)
def test_rows_that_fill_up_a_fixed_shape_change_nothing(monkeypatch, prompts, decoding, model, batch_size):
    """The shapes of compiled steps, without compilation."""
    monkeypatch.setattr(compiled, "compiled_denoise", lambda device: denoise)
    shaped = decoding.model_copy(update={"compile": True})
    for prompt, generation in zip(prompts, generate(model, prompts, shaped, batch_size), strict=True):
        assert_equals_the_oracle(generation, model, prompt, decoding)


def test_a_share_met_exactly_opens_a_block():
    """5/12 is more than 1 - 7/12 in floating point; both decoders count tokens."""
    shape = {"gen_length": 24, "block_length": 12, "rule": "entropy", "threshold": 0.0}
    decoding = DecodingConfig(**shape, mode="multi_block", block_add_threshold=5 / 12, stop_at_eos=False)
    for model in MODELS:
        generation = generate(model, [[5, 6]], decoding)[0]
        assert_equals_the_oracle(generation, model, [5, 6], decoding)
        assert min(generation.commit_step[12:]) >= 5


def test_what_only_fills_up_a_batch_has_not_been_read():
    """Rows of a batch read different numbers of positions; `stability` requires a previous reading."""
    limits = {"rule": "stability", "threshold": 0.15, "stability_threshold": 1.0}
    shape = {"gen_length": 24, "block_length": 4, "mode": "multi_block", "block_add_threshold": 0.75}
    decoding = DecodingConfig(**limits, **shape, stop_at_eos=False)
    prompts = [[start, 5] for start in range(3, 9)]
    for model in MODELS[:3]:
        for prompt, generation in zip(prompts, generate(model, prompts, decoding), strict=True):
            assert_equals_the_oracle(generation, model, prompt, decoding)


@given(prompts, st.sampled_from([5, 7]), st.sampled_from(["none", "exact"]), batch_sizes)
def test_autoregressive_rows_equal_the_oracle(prompts, seed, cache, batch_size):
    model = AUTOREGRESSIVE[seed]
    decoding = DecodingConfig(mode="autoregressive", gen_length=16, cache=cache)
    for prompt, generation in zip(prompts, generate(model, prompts, decoding, batch_size), strict=True):
        assert_equals_the_oracle(generation, model, prompt, decoding)
        assert generation.commit_step[: generation.num_tokens] == list(range(generation.num_tokens))
        assert generation.nfe == generation.num_tokens


@given(
    prompts,
    st.sampled_from(sorted(THRESHOLDS)).flatmap(decodings).filter(lambda each: each.mode == "pipelined"),
    st.sampled_from(MODELS),
    batch_sizes,
)
def test_an_exact_cache_changes_nothing(prompts, decoding, model, batch_size):
    cached, uncached = (
        generate(model, prompts, decoding.model_copy(update={"cache": cache}), batch_size)
        for cache in ("exact", "none")
    )
    for prompt, one, other in zip(prompts, cached, uncached, strict=True):
        if choices(one) != choices(other):  # a tie in float32, decided by rounding of sums
            oracle = partial(by_the_oracle, prompt=prompt, decoding=decoding)
            assert is_rounding(one, model, oracle)
            assert is_rounding(other, model, oracle)


@given(prompts, st.sampled_from(MODELS), st.floats(1.5, 3.5), st.sampled_from([4, 8, 12]))
def test_what_follows_a_block_changes_nothing_before_it(prompts, model, threshold, block_length):
    """Block-causal attention: the beginning of a longer response is the same if blocks open one at a time."""
    shape = {"block_length": block_length, "threshold": threshold, "stop_at_eos": False, "mode": "pipelined"}
    whole = {**shape, "block_add_threshold": 1.0, "decoded_token_threshold": 1.0}
    long, short = (
        DecodingConfig(gen_length=length, **whole) for length in (24, 12 if block_length != 8 else 16)
    )
    for one, other in zip(generate(model, prompts, long), generate(model, prompts, short), strict=True):
        assert one.tokens[: short.gen_length] == other.tokens


def test_a_row_behind_its_batch_mate_reads_within_the_canvas_in_use():
    """A forward pass without cache ends at the last block open in any row; other rows are filled up."""
    shape = {"gen_length": 24, "block_length": 4, "rule": "margin", "threshold": 0.25, "cache": "none"}
    decoding = DecodingConfig(**shape, mode="pipelined", block_add_threshold=0.5, stop_at_eos=False)
    prompts = [[2] * 7, [2, 2, 2, 5], [3, 9], [7]]
    for model in MODELS:
        for prompt, generation in zip(prompts, generate(model, prompts, decoding), strict=True):
            assert_equals_the_oracle(generation, model, prompt, decoding)


@given(
    prompts,
    st.sampled_from(sorted(RULES)).flatmap(decodings),
    st.sampled_from([model_of(seed, end_token_ids=(7, 31, 12)) for seed in range(3)]),
    batch_sizes,
)
def test_rows_that_may_end_by_several_tokens_equal_the_oracle(prompts, decoding, model, batch_size):
    for prompt, generation in zip(prompts, generate(model, prompts, decoding, batch_size), strict=True):
        assert_equals_the_oracle(generation, model, prompt, decoding)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "exact"])
@pytest.mark.parametrize("mode", ["sequential", "multi_block", "pipelined"])
def test_rows_that_stop_early_make_room_for_others(mode, cache):
    """Five slots for twelve rows, some of which end with masks left while others use all forward passes."""
    if cache != "none" and (cache == "exact") != (mode == "pipelined"):
        pytest.skip("no such combination")
    decoding = DecodingConfig(gen_length=24, block_length=8, threshold=1.5, mode=mode, cache=cache)
    prompts = [[start, 5] * (start % 5 + 1) for start in range(3, 15)]
    stopped = []
    for model in MODELS[1::2]:
        for prompt, generation in zip(prompts, generate(model, prompts, decoding, 5), strict=True):
            assert_equals_the_oracle(generation, model, prompt, decoding)
            stopped.append(0.0 in generation.confidence)
    assert 3 <= sum(stopped) <= len(stopped) - 3


def assert_equals_the_oracle(
    generation: Generation, model: DiffusionTransformer, prompt: list[int], decoding: DecodingConfig
) -> None:
    assert_same(generation, model, partial(by_the_oracle, prompt=prompt, decoding=decoding))


def by_the_oracle(
    model: DiffusionTransformer, prompt: list[int], decoding: DecodingConfig, stop: Stop | None = None
) -> Generation:
    return (revise_one if decoding.revises else decode_one)(model, prompt, decoding, stop)


def test_rounding_explains_a_tie_and_no_other_budget():
    """Two entropies that differ by 4e-7 decide this row, and a probability between two steps the second one;
    found by chance."""
    model, prompt = MODELS[3], [33, 28]
    shape = {"gen_length": 24, "block_length": 24, "rule": "entropy_budget", "stop_at_eos": False}
    cached = {"mode": "multi_block", "cache": "prefix", "settle_rounds": 2, "refresh_every": 3}
    decoding = DecodingConfig(**shape, **cached, threshold=5.0)
    oracle = partial(by_the_oracle, prompt=prompt, decoding=decoding)
    assert is_rounding(generate(model, [prompt], decoding)[0], model, oracle)
    revising = DecodingConfig(
        gen_length=24,
        block_length=12,
        mode="revising",
        rule="margin",
        threshold=0.0546875,
        final_threshold=1.0,
        revision_passes=4,
        suppress_eos=True,
    )
    revised = partial(by_the_oracle, prompt=[16], decoding=revising)
    assert is_rounding(generate(MODELS[1], [[16]], revising)[0], MODELS[1], revised)
    larger = DecodingConfig(**shape, **cached, threshold=5.5)
    assert not is_rounding(generate(model, [prompt], larger)[0], model, oracle)


@given(prompts, st.sampled_from(sorted(RULES)).flatmap(decodings), st.sampled_from(MODELS), batch_sizes)
def test_observed_steps_replay_every_row(prompts, decoding, model, batch_size):
    observed: list[Step] = []
    generations = generate(model, prompts, decoding, batch_size, observe=observed.extend)
    for row, generation in enumerate(generations):
        steps = [step for step in observed if step.row == row]
        (replay_revisions if decoding.revises else replay)(steps, generation, decoding)


def replay(steps: list[Step], generation: Generation, decoding: DecodingConfig) -> None:
    """Blocks open by committed shares, only masked positions of open blocks are read, the first incomplete
    block commits a token in every forward pass, and the commits add up to the generation."""
    length, blocks = decoding.block_length, decoding.blocks
    committed: dict[int, tuple[int, int, float]] = {}  # token, commit step, probability by offset
    opened = 1
    assert [step.denoise_step for step in steps] == list(range(generation.nfe))
    assert [step.done for step in steps] == [False] * (generation.nfe - 1) + [True]
    for step in steps:
        share = sum(offset // length == opened - 1 for offset in committed) / length
        stops = decoding.stop_at_eos or decoding.mode == "pipelined"
        eos_seen = stops and EOS in [token for token, _, _ in committed.values()]
        opened += share >= (decoding.block_add_threshold or 1) and opened < blocks and not eos_seen
        masked = [offset for offset in range(opened * length) if offset not in committed]
        assert step.offsets == masked
        chosen = [offset for offset, commit in zip(step.offsets, step.commit, strict=True) if commit]
        if not RULES[decoding.rule].whole_response:  # Dream's sampler may commit nothing
            assert chosen
            assert chosen[0] // length == masked[0] // length
        for offset, token, probability, entropy, commit in zip(
            step.offsets, step.tokens, step.probability, step.entropy, step.commit, strict=True
        ):
            assert 0 < probability <= 1.00001
            assert entropy >= -1e-6
            if commit:
                committed[offset] = token, step.denoise_step, probability
        found = [offset for offset in committed if committed[offset][0] == EOS]
        if decoding.eos_fill and found:
            for offset in range(min(found) + 1, decoding.gen_length):
                if committed.get(offset, (None,))[0] != EOS:
                    committed[offset] = EOS, step.denoise_step, 0.0
    rest = (EOS, generation.nfe - 1, 0.0)
    rows = zip(generation.tokens, generation.commit_step, generation.confidence, strict=True)
    assert list(rows) == [committed.get(offset, rest) for offset in range(decoding.gen_length)]


def replay_revisions(steps: list[Step], generation: Generation, decoding: DecodingConfig) -> None:
    """Every forward pass reads one block, the blocks one after the other; a pass without masks is needed and
    allowed, and the last changes add up to the generation."""
    length, passes = decoding.block_length, decoding.revision_passes or 0
    held: dict[int, tuple[int, int, float]] = {}  # token, step of the last change, probability by offset
    assert [step.denoise_step for step in steps] == list(range(generation.nfe))
    assert [step.done for step in steps] == [False] * (generation.nfe - 1) + [True]
    starts = [step.offsets[0] for step in steps]
    assert starts == sorted(starts)
    for start in range(0, starts[-1] + 1, length):
        block = range(start, start + length)
        further, before = 0, steps[0]
        for step in [step for step in steps if step.offsets[0] == start]:
            assert step.offsets == list(block)
            full = all(offset in held for offset in block)
            if full:
                further += 1
                assert any(
                    probability < decoding.final_threshold + 1e-6 for probability in before.probability
                )
                assert any(before.commit)
            new = 0
            for offset, token, p, commit in zip(
                step.offsets, step.tokens, step.probability, step.commit, strict=True
            ):
                new += offset not in held and commit
                assert offset not in held or commit == (token != held[offset][0])
                if commit:
                    held[offset] = token, step.denoise_step, p
            assert full or new
            before = step
        assert further <= passes
        assert all(offset in held for offset in block)
    rest = (EOS, generation.nfe - 1, 0.0)
    rows = zip(generation.tokens, generation.commit_step, generation.confidence, strict=True)
    assert list(rows) == [held.get(offset, rest) for offset in range(decoding.gen_length)]
