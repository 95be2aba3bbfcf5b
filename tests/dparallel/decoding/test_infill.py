"""`infill` equals its oracle in every row, independent of the batch; a gap at the end equals `generate`."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dparallel import DecodingConfig, DecodingError, Generation, generate
from dparallel.decoding import compiled
from dparallel.decoding.canvas import Step
from dparallel.decoding.denoise import denoise
from dparallel.decoding.generate import LengthError
from dparallel.decoding.infill import gap_blocks, infill
from dparallel.decoding.infill_oracle import infill_one
from dparallel.models.backbone import DiffusionTransformer
from dparallel.rules.rules import RULES
from tests.conftest import random_model
from tests.dparallel.decoding.same import assert_same
from tests.dparallel.decoding.test_against_oracle import MODELS, decodings

MASK, EOS = 1, 2
FULL = [model for model in MODELS if model.config.attention_pattern in ("full", None)]


def suited(decoding: DecodingConfig) -> bool:
    return decoding.mode in ("sequential", "multi_block") and decoding.cache == "none"


@st.composite
def canvases(draw) -> list[int]:
    """Texts of 0 to 4 tokens and gaps of 0 to 11 in turn, with both, up to 50 positions."""
    canvas: list[int] = []
    for gap in draw(st.lists(st.integers(0, 11), min_size=1, max_size=4)):
        canvas += [*draw(st.lists(st.integers(2, 49), max_size=4)), *[MASK] * gap]
    canvas += draw(st.lists(st.integers(2, 49), max_size=4))
    canvas = canvas[:48]
    return canvas if MASK in canvas and set(canvas) != {MASK} else [5, *canvas, MASK]


def few_steps(decoding: DecodingConfig, rows: list[list[int]]) -> DecodingConfig:
    """Of Dream's samplers, as many steps as the smallest row allows at most."""
    if not RULES[decoding.rule].whole_response:
        return decoding
    most = min(row.count(MASK) for row in rows)
    return decoding.model_copy(update={"steps": min(decoding.steps or 1, most)})


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=4)  # the rules share everything but their choice
@given(st.data(), st.lists(canvases(), min_size=1, max_size=6), st.sampled_from(FULL), st.integers(1, 5))
def test_every_row_equals_the_oracle(rule, data, rows, model, batch_size):
    decoding = few_steps(data.draw(decodings(rule).filter(suited)), rows)
    for row, filled in zip(rows, infill(model, rows, decoding, batch_size), strict=True):
        assert_equals_the_oracle(filled, model, row, decoding)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(canvases(), min_size=1, max_size=5), st.sampled_from(FULL), st.integers(2, 4), st.booleans())
def test_rows_that_fill_up_a_fixed_shape_change_nothing(monkeypatch, rows, model, batch_size, several):
    """The shapes of compiled steps, without compilation."""
    monkeypatch.setattr(compiled, "compiled_denoise", lambda device: denoise)
    mode = {"mode": "multi_block", "block_add_threshold": 0.3} if several else {}
    decoding = DecodingConfig(gen_length=24, block_length=4, threshold=2.5, **mode)
    shaped = decoding.model_copy(update={"compile": True})
    for row, filled in zip(rows, infill(model, rows, shaped, batch_size), strict=True):
        assert_equals_the_oracle(filled, model, row, decoding)


def assert_equals_the_oracle(
    filled: Generation, model: DiffusionTransformer, canvas: list[int], decoding: DecodingConfig
) -> None:
    assert_same(filled, model, lambda beside: infill_one(beside, canvas, decoding))


@pytest.mark.parametrize("rule", ["steps", "confidence", "entropy", "dream_entropy"])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_gap_at_the_end_is_a_response(rule: str, temperature: float) -> None:
    """Of whole blocks: the same tokens, steps and forward passes as `generate`, sampled ones too."""
    further = {"steps": 12} if RULES[rule].scheduled else {"threshold": 0.3 if rule == "confidence" else 2.0}
    decoding = DecodingConfig(
        gen_length=24, block_length=24 if RULES[rule].whole_response else 8, rule=rule, stop_at_eos=False,
        temperature=temperature, seed=3 if temperature else None, **further,
    )  # fmt: skip
    for model in FULL:
        prompt = [5, 6, 7]
        [response] = generate(model, [prompt], decoding)
        [filled] = infill(model, [[*prompt, *[MASK] * 24]], decoding)
        if temperature:  # the seed of a row is made from its tokens, gaps included
            assert filled.tokens != response.tokens
        else:
            assert replace(filled, num_tokens=response.num_tokens) == response


def test_what_follows_a_gap_counts() -> None:
    decoding = DecodingConfig(gen_length=8, block_length=8, threshold=1.0)
    one, other = infill(random_model(), [[5, *[MASK] * 6, 30, 31], [5, *[MASK] * 6, 12, 13]], decoding)
    assert one.tokens != other.tokens


def test_blocks_of_gaps_by_hand() -> None:
    """Each gap has blocks of its own, the last one shorter; Dream's samplers have one block of all."""
    canvas = [9, 1, 1, 1, 1, 1, 9, 9, 1, 1, 9, 1]
    blocks = DecodingConfig(gen_length=8, block_length=4, threshold=1.0)
    assert gap_blocks(canvas, MASK, blocks) == [
        *(1, 2, 3, 4, 5, None, None, None), *(8, 9, None, None), *(11, None, None, None)
    ]  # fmt: skip
    dream = DecodingConfig(gen_length=8, rule="dream_entropy", steps=2)
    assert gap_blocks(canvas, MASK, dream) == [1, 2, 3, 4, 5, 8, 9, 11]


def test_steps_by_hand() -> None:
    """Two tokens per forward pass, as in the decoding: 5 tokens in blocks of 4 and 1, then 2, then 1."""
    decoding = DecodingConfig(gen_length=8, block_length=4, rule="steps", steps=4)
    canvas = [9, 1, 1, 1, 1, 1, 9, 9, 1, 1, 9, 1]
    [filled] = infill(random_model(), [canvas], decoding)
    assert sorted(filled.commit_step[:4]) == [0, 0, 1, 1]
    assert filled.commit_step[4:] == [2, 3, 3, 4]
    assert filled.nfe == 5


@given(st.lists(canvases(), min_size=1, max_size=4), st.sampled_from(FULL), st.booleans(), st.integers(1, 3))
def test_observed_steps_count_the_masked_positions(rows, model, several, batch_size):
    mode = {"mode": "multi_block"} if several else {}
    decoding = DecodingConfig(gen_length=24, block_length=4, threshold=2.0, **mode)
    steps: list[Step] = []
    for row, filled in enumerate(infill(model, rows, decoding, batch_size, steps.extend)):
        own = [step for step in steps if step.row == row]
        assert [step.denoise_step for step in own] == list(range(filled.nfe))
        assert [step.done for step in own] == [False] * (filled.nfe - 1) + [True]
        found: dict[int, tuple[int, int]] = {}
        for step in own:
            assert not set(step.offsets) & set(found)
            for offset, token, commit in zip(step.offsets, step.tokens, step.commit, strict=True):
                if commit:
                    found[offset] = token, step.denoise_step
        expected = zip(filled.tokens, filled.commit_step, strict=True)
        assert [found[offset] for offset in range(rows[row].count(MASK))] == list(expected)


def test_an_end_token_in_a_gap_ends_nothing() -> None:
    """Gaps have fixed lengths; end tokens are not counted."""
    decoding = DecodingConfig(gen_length=24, block_length=8, threshold=1.5)
    canvas = [5, *[MASK] * 20, 6, *[MASK] * 20, 7]
    counted = set()
    for model in FULL:
        [filled] = infill(model, [canvas], decoding)
        assert MASK not in filled.tokens
        assert len(filled.tokens) == 40
        assert filled.num_tokens == 40 - filled.tokens.count(EOS)
        assert min(filled.confidence) > 0
        counted.add(filled.num_tokens)
    assert min(counted) < 40


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "pipelined"}, "mode='pipelined' with infill: there no token attends to the text behind"),
        (
            {"mode": "revising"},
            "mode='revising' with infill: there it revises whole .* use mode='sequential' or 'multi",
        ),
        ({"cache": "dual"}, "cache='dual' with infill: .* use cache='none'"),
        ({"rule": "dream_entropy", "steps": 8}, "steps=8 for rule='dream_entropy', and infill 0 has 3 token"),
    ],
)
def test_settings_that_do_not_suit_are_named(settings: dict, message: str) -> None:
    decoding = DecodingConfig(gen_length=8, block_length=8, **settings)
    with pytest.raises(DecodingError, match=message):
        infill(random_model(), [[5, 1, 1, 1, 6]], decoding)


@pytest.mark.parametrize(
    ("canvas", "message"),
    [
        ([5, 6], "infill 1 has no gap: an infill is text with at least one gap"),
        ([1, 1], "infill 1 has no text"),
        ([5, 99, 1], "infill 1 holds token id 99; valid ids are 0 to 49 without the mask 1"),
        ([5, *[1] * 64], "infill 1 has 65 tokens with its gaps, and this model takes 64 .*: shorten"),
        ([5, 1, 0, 0], "infill 1 ends with 2 of the padding token 0"),
    ],
)
def test_canvases_that_do_not_suit_are_named(canvas: list[int], message: str) -> None:
    decoding = DecodingConfig(gen_length=8, block_length=8)
    with pytest.raises(DecodingError, match=message) as caught:
        infill(random_model(), [[5, 1], canvas], decoding)
    assert isinstance(caught.value, LengthError) == ("takes 64" in message)


@pytest.mark.parametrize("pattern", ["block_causal", "causal"])
def test_models_that_only_look_back_are_refused(pattern: str) -> None:
    model = random_model(attention_pattern=pattern, predicts_next=True)
    with pytest.raises(DecodingError, match=f"attention_pattern='{pattern}' .* do not attend to the text"):
        infill(model, [[5, 1, 6]], DecodingConfig(gen_length=8, block_length=8))
