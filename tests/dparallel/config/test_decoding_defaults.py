"""Decoding settings that are left out are filled in by rule and mode; valid ones stay valid if read again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dparallel.config.base import ConfigError
from dparallel.config.decoding import DecodingConfig, beside
from dparallel.config.modes import MODES
from dparallel.rules.rules import RULES


def test_what_is_left_out_is_filled_in_where_it_has_an_effect():
    assert DecodingConfig().threshold == 0.5
    assert DecodingConfig(threshold=0.0).threshold == 0.0
    assert DecodingConfig(rule="steps", steps=8).threshold is None
    assert DecodingConfig(rule="stability", threshold=0.9).stability_threshold == 0.01
    assert (DecodingConfig(rule="frechet").threshold, DecodingConfig(rule="factor").threshold) == (0.25, 1.0)

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
    revising = DecodingConfig(mode="revising")
    assert (revising.rule, revising.threshold, revising.cache) == ("contiguous", 0.5, "none")
    assert (revising.final_threshold, revising.revision_passes) == (0.9, 8)
    assert DecodingConfig(mode="revising", rule="entropy").rule == "entropy"
    for each in (pipelined, autoregressive, revising):
        assert DecodingConfig(**each.model_dump()) == each


def test_d3llms_second_threshold_is_accepted():
    """It has no effect in `multi_block`, but is part of the published settings."""
    assert DecodingConfig(mode="multi_block", decoded_token_threshold=0.95).decoded_token_threshold == 0.95
    assert DecodingConfig(mode="multi_block").decoded_token_threshold is None


def test_the_threshold_of_a_rule_is_not_kept_for_another():
    confident = DecodingConfig(rule="confidence", threshold=0.9)
    assert "threshold" not in beside(confident.model_dump(), {"rule": "margin"})
    assert beside(confident.model_dump(), {"rule": "confidence"})["threshold"] == 0.9


def test_the_rule_of_a_mode_is_not_kept_for_another():
    """Unless the change names a rule; then its settings stay, if it is the same one."""

    def changed(decoding, **changes):
        return DecodingConfig(**beside(decoding.model_dump(), changes), **changes)

    entropy = DecodingConfig(rule="entropy", threshold=0.3)
    revising = DecodingConfig(mode="revising", threshold=0.7, revision_passes=3)
    assert changed(entropy, mode="revising") == DecodingConfig(mode="revising")
    assert changed(entropy, mode="revising", threshold=0.7).rule == "contiguous"
    assert changed(entropy, mode="revising", rule="entropy").threshold == 0.3
    assert changed(entropy, mode="multi_block").threshold == 0.3
    assert changed(revising, mode="sequential") == DecodingConfig()
    assert changed(revising, cache="dual").revision_passes == 3
    assert changed(revising, rule="confidence", threshold=0.9).revision_passes == 3
    given = {"mode": "revising", "threshold": 0.7}
    assert beside(given, {"rule": "contiguous"}) == given, "its rule, though not stated"
    assert beside(given, {"rule": "entropy"}) == {"mode": "revising"}


def test_tables_name_settings_and_their_defaults_are_valid():
    for mode, takes in MODES.items():
        fields = {*takes.fixed, *takes.usual, *takes.defaults, *takes.cached}
        assert fields <= set(DecodingConfig.model_fields)
        for cache in takes.caches:
            decoding = DecodingConfig(mode=mode, cache=cache)
            for field, value in {**takes.usual, **takes.defaults}.items():
                assert getattr(decoding, field) == value
            for field, value in takes.cached.items():
                assert getattr(decoding, field) == (None if cache == "none" else value)
            assert DecodingConfig.model_validate(decoding.model_dump()) == decoding


CHOICES = {  # for each setting: its default, a value that may have an effect, and one that may not
    "gen_length": st.sampled_from([32, 64]),
    "block_length": st.sampled_from([1, 32, 64]),
    "rule": st.sampled_from(list(RULES)),
    "threshold": st.sampled_from([None, 0.5, 2.0]),
    "stability_threshold": st.sampled_from([None, 0.1]),
    "steps": st.sampled_from([None, 2, 64]),
    "mode": st.sampled_from(list(MODES)),
    "block_add_threshold": st.sampled_from([None, 0.5]),
    "decoded_token_threshold": st.sampled_from([None, 0.5]),
    "final_threshold": st.sampled_from([None, 0.0, 0.5]),
    "revision_passes": st.sampled_from([None, 0, 2]),
    "cache": st.sampled_from(["none", "prefix", "dual", "exact"]),
    "settle_rounds": st.sampled_from([None, 2]),
    "refresh_every": st.sampled_from([None, 2]),
    "stop_at_eos": st.booleans(),
    "eos_fill": st.sampled_from([None, "immediate"]),
    "suppress_eos": st.just(True),
    "temperature": st.sampled_from([0.0, 1.0]),
    "top_p": st.sampled_from([None, 0.5]),
    "top_k": st.sampled_from([None, 5]),
}


@given(st.fixed_dictionaries({}, optional=CHOICES))
def test_what_is_valid_is_complete_and_stays_valid(settings):
    """Settings with defaults filled in equal the given ones, and validate to themselves."""
    try:
        decoding = DecodingConfig(**settings)
    except ConfigError:
        return
    given = {key: value for key, value in settings.items() if value is not None}
    assert decoding.model_dump(include=set(given)) == given
    assert DecodingConfig(**decoding.model_dump()) == decoding
    assert (decoding.steps is None) == (decoding.threshold is not None)
    assert decoding.gen_length % decoding.block_length == 0


def test_settings_that_are_off_are_in_no_key():
    """Results of earlier versions, which did not have these settings, keep their keys."""
    assert not {"eos_fill", "suppress_eos", "top_k"} & DecodingConfig().model_dump(mode="json").keys()
    assert DecodingConfig(eos_fill=None, suppress_eos=False).what() == DecodingConfig().what()
    given = {"eos_fill": "immediate", "suppress_eos": True, "top_k": 5}
    assert given.items() <= DecodingConfig(**given, temperature=1).portable().items()
