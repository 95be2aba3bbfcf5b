"""Every decoding that makes no sense is refused with the field, its value and the remedy."""

import pytest
from pydantic import ValidationError

from dparallel.config.decoding import DecodingConfig

MULTI_BLOCK = {"mode": "multi_block"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gen_length": 100}, r"gen_length=100 is not divisible by block_length=32; .* nearest .* is 96"),
        ({"gen_length": 8}, r"gen_length=8 is not divisible by block_length=32; .* nearest .* is 32"),
        ({"rule": "fastest"}, r"unknown rule='fastest'; known rules: .*entropy_budget, margin, stability"),
        ({"rule": "steps"}, r"rule='steps' with steps=None, .*: give steps \(at most gen_length=256\)"),
        ({"rule": "steps", "steps": 256, "threshold": 0.5}, r"threshold=0\.5: give steps .* no threshold"),
        ({"rule": "steps", "steps": 300}, r"steps=300 must be a multiple of the 8 blocks"),
        ({"rule": "steps", "steps": 264}, r"steps=264 .* at most gen_length=256"),
        ({"rule": "entropy", "steps": 8}, r"rule='entropy' .* steps=8: give threshold and no steps"),
        ({"rule": "confidence"}, r"rule='confidence' with threshold=None, .*: give threshold"),
        ({"rule": "entropy_budget"}, r"rule='entropy_budget' with threshold=None, .*: give threshold"),
        ({"rule": "margin"}, r"rule='margin' with threshold=None, .*: give threshold"),
        ({"rule": "stability"}, r"rule='stability' with threshold=None, .*: give threshold"),
        (
            {"rule": "confidence", "threshold": 1.5},
            r"threshold=1\.5 .*'confidence' compares probabilities: .* 0 to 1",
        ),
        (
            {"rule": "margin", "threshold": 1.5},
            r"threshold=1\.5 .*'margin' compares probabilities: .* 0 to 1",
        ),
        (
            {"rule": "stability", "threshold": 2.0},
            r"threshold=2\.0 .*'stability' compares probabilities: .* 0 to 1",
        ),
        (
            {"rule": "confidence", "threshold": 0.9, "stability_threshold": 0.1},
            r"stability_threshold=0\.1 has no effect with rule='confidence': drop it or use rule='stability'",
        ),
        (
            {"block_add_threshold": 0.5},
            r"block_add_threshold=0\.5 has no effect with mode='sequential': drop it or use mode=",
        ),
        (
            {"decoded_token_threshold": 0.5},
            r"decoded_token_threshold=0\.5 has no effect with mode='sequential': drop it or use",
        ),
        (
            {"cache": "dual", "settle_rounds": 2},
            r"settle_rounds=2 has no effect with mode='sequential', cache='dual': drop it or use .* a cache",
        ),
        (
            {**MULTI_BLOCK, "refresh_every": 4},
            r"refresh_every=4 has no effect with mode='multi_block', cache='none': drop it or use .* a cache",
        ),
        (
            {**MULTI_BLOCK, "rule": "steps", "steps": 8},
            r"rule='steps' with mode='multi_block': .*; use mode='sequential' or a rule with a threshold",
        ),
        (
            {"mode": "pipelined", "rule": "steps", "steps": 8},
            r"rule='steps' with mode='pipelined': .*; use mode='sequential' or a rule with a threshold",
        ),
        (
            {"mode": "pipelined", "cache": "dual"},
            r"cache='dual' with mode='pipelined': give 'exact' or 'none'",
        ),
        ({"cache": "exact"}, r"cache='exact' with mode='sequential': give 'prefix', 'dual' or 'none'"),
        ({**MULTI_BLOCK, "cache": "exact"}, r"cache='exact' with mode='multi_block': give 'prefix'"),
        (
            {"mode": "pipelined", "settle_rounds": 2},
            r"settle_rounds=2 has no effect with mode='pipelined', cache='exact': drop it",
        ),
        (
            {"mode": "autoregressive", "block_add_threshold": 0.5},
            r"block_add_threshold=0\.5 has no effect with mode='autoregressive': drop it or use mode=",
        ),
        (
            {"mode": "autoregressive", "block_length": 4, "steps": 64, "gen_length": 64},
            r"block_length=4, rule='steps' with mode='autoregressive', .* token by token: drop them",
        ),
        (
            {"mode": "autoregressive", "rule": "entropy", "threshold": 0.5, "steps": None},
            r"rule='entropy' with mode='autoregressive', .* token by token: drop them",
        ),
        ({"top_p": 0.9}, r"top_p=0\.9 has no effect at temperature=0\.0: raise temperature or drop top_p"),
    ],
)
def test_combinations_without_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        DecodingConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gen_length": 0}, "gen_length\n.*greater than 0"),
        ({"block_length": 0}, "block_length\n.*greater than 0"),
        ({"threshold": -0.1}, "threshold\n.*greater than or equal to 0"),
        ({"threshold": float("nan")}, "threshold\n.*finite number"),
        ({"rule": "stability", "threshold": 0.5, "stability_threshold": -1}, "greater than or equal to 0"),
        ({"rule": "steps", "steps": 0}, "steps\n.*greater than 0"),
        ({"mode": "parallel"}, "mode\n.*'sequential', 'multi_block', 'pipelined' or 'autoregressive'"),
        ({"cache": "full"}, "cache\n.*'none', 'prefix', 'dual' or 'exact'"),
        ({**MULTI_BLOCK, "block_add_threshold": 0.0}, "block_add_threshold\n.*greater than 0"),
        ({**MULTI_BLOCK, "block_add_threshold": 1.1}, "block_add_threshold\n.*less than or equal to 1"),
        ({**MULTI_BLOCK, "decoded_token_threshold": 0.0}, "decoded_token_threshold\n.*greater than 0"),
        (
            {**MULTI_BLOCK, "decoded_token_threshold": 1.1},
            "decoded_token_threshold\n.*less than or equal to 1",
        ),
        ({**MULTI_BLOCK, "cache": "dual", "settle_rounds": 0}, "settle_rounds\n.*greater than 0"),
        ({**MULTI_BLOCK, "cache": "dual", "refresh_every": 0}, "refresh_every\n.*greater than 0"),
        ({"temperature": -1.0}, "temperature\n.*greater than or equal to 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p\n.*greater than 0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p\n.*less than or equal to 1"),
        ({"seed": -1}, "seed\n.*greater than or equal to 0"),
        ({"seed": 10**20}, "seed\n.*less than"),
        ({"compile": "maybe"}, "compile\n.*valid boolean"),
        ({"block_size": 32}, "block_size\n.*Extra inputs"),
    ],
)
def test_values_out_of_range(settings, message):
    with pytest.raises(ValidationError, match=message):
        DecodingConfig(**settings)


def test_what_is_left_out_is_filled_in_where_it_has_an_effect():
    assert DecodingConfig().threshold == 0.5
    assert DecodingConfig(threshold=0.0).threshold == 0.0
    assert DecodingConfig(rule="steps", steps=8).threshold is None
    assert DecodingConfig(rule="stability", threshold=0.9).stability_threshold == 0.01

    open_blocks = DecodingConfig(mode="multi_block")
    assert open_blocks.block_add_threshold == 0.1
    assert (open_blocks.settle_rounds, open_blocks.refresh_every) == (None, None)
    cached = DecodingConfig(mode="multi_block", cache="dual", settle_rounds=2)
    assert (cached.settle_rounds, cached.refresh_every) == (2, 8)
    assert DecodingConfig(cache="dual").refresh_every is None


def test_settings_round_trip_and_are_frozen():
    decoding = DecodingConfig(mode="multi_block", cache="prefix", rule="margin", threshold=0.25)
    assert DecodingConfig.model_validate_json(decoding.model_dump_json()) == decoding
    with pytest.raises(ValidationError, match="frozen"):
        decoding.steps = 3  # type: ignore[misc]


def test_what_a_mode_fills_in():
    pipelined = DecodingConfig(mode="pipelined")
    assert (pipelined.cache, pipelined.block_add_threshold, pipelined.decoded_token_threshold) == (
        "exact",
        0.1,
        0.95,
    )
    assert DecodingConfig(mode="pipelined", cache="none").cache == "none"
    autoregressive = DecodingConfig(mode="autoregressive", gen_length=7)
    assert (autoregressive.cache, autoregressive.block_length) == ("exact", 1)
    assert (autoregressive.rule, autoregressive.steps, autoregressive.threshold) == ("steps", 7, None)
    for each in (pipelined, autoregressive):
        assert DecodingConfig(**each.model_dump()) == each
