"""Rows end at a stop: tokens, forward passes and counts equal the oracle's, and nothing before changes."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dparallel import DecodingConfig, generate
from dparallel.rules.rules import RULES
from tests.dparallel.decoding.same import choices
from tests.dparallel.decoding.test_against_oracle import (
    AUTOREGRESSIVE,
    EOS,
    MODELS,
    batch_sizes,
    by_the_oracle,
    decodings,
    prompts,
)


def stop_at_tokens(*wanted: int):
    """Ends after the first token of `wanted` that does not begin the response."""

    def stop(tokens: Sequence[int]) -> int | None:
        assert EOS not in tokens
        return next((place + 1 for place, token in enumerate(tokens) if place and token in wanted), None)

    return stop


wanted_tokens = st.lists(st.integers(3, 49), min_size=5, max_size=12)


@given(
    prompts,
    st.sampled_from(sorted(RULES)).flatmap(decodings),
    st.sampled_from(MODELS),
    batch_sizes,
    wanted_tokens,
)
def test_stopped_rows_equal_the_oracle(prompts, decoding, model, batch_size, wanted):
    stop = stop_at_tokens(*wanted)
    finished = {}
    found = generate(model, prompts, decoding, batch_size, finished=finished.__setitem__, stop=stop)
    assert [finished[row] for row in range(len(prompts))] == found
    whole = generate(model, prompts, decoding, batch_size)
    for prompt, stopped, full in zip(prompts, found, whole, strict=True):
        count = stopped.num_tokens
        assert (stopped.tokens[:count], stopped.nfe <= full.nfe) == (full.tokens[:count], True)
        if choices(full) == choices(by_the_oracle(model, prompt, decoding)):  # no tie decided by rounding
            assert choices(stopped) == choices(by_the_oracle(model, prompt, decoding, stop))
        if decoding.stop_at_eos:
            end = stop(full.tokens[: full.tokens.index(EOS)] if EOS in full.tokens else full.tokens)
            assert count == (full.num_tokens if end is None else end)
        else:
            assert choices(stopped) == choices(full)


@given(prompts, st.sampled_from([5, 7]), batch_sizes, wanted_tokens)
def test_an_autoregressive_row_ends_with_the_token_that_completes_a_stop(prompts, seed, size, wanted):
    decoding = DecodingConfig(mode="autoregressive", gen_length=16)
    stop = stop_at_tokens(*wanted)
    for generation in generate(AUTOREGRESSIVE[seed], prompts, decoding, size, stop=stop):
        assert generation.nfe == generation.num_tokens


def test_forward_passes_after_a_stop_are_not_spent():
    model, prompt = MODELS[0], [5, 6]
    decoding = DecodingConfig(gen_length=24, block_length=4, rule="steps", steps=24)
    full = generate(model, [prompt], decoding)[0]
    assert full.num_tokens > 10
    stopped = generate(model, [prompt], decoding, stop=lambda tokens: 6 if len(tokens) >= 6 else None)[0]
    last = max(full.commit_step[:6])
    assert stopped.nfe == last + 1 < full.nfe
    assert stopped.num_tokens == 6
    assert stopped.tokens[8:] == [EOS] * 16
    assert stopped.commit_step[8:] == [last] * 16
    assert stopped.confidence[8:] == [0.0] * 16


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_stopped_rows_make_room_for_others(cache):
    decoding = DecodingConfig(gen_length=24, block_length=8, threshold=1.5, cache=cache)
    rows = [[start, 5] * (start % 5 + 1) for start in range(3, 15)]
    stop = stop_at_tokens(*range(3, 50, 4))
    for model in MODELS[:3]:
        for prompt, generation in zip(rows, generate(model, rows, decoding, 5, stop=stop), strict=True):
            assert choices(generation) == choices(by_the_oracle(model, prompt, decoding, stop))
