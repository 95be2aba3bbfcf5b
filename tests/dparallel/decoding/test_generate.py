import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dparallel import DecodingConfig, DecodingError, generate
from dparallel.config.decoding import MAX_TEMPERATURE, MIN_TEMPERATURE, MIN_TOP_P
from dparallel.tiny.tokenizer import build_tokenizer
from tests.conftest import random_model
from tests.dparallel.decoding.golden_cases import CASES, assert_agrees, decoding_of

# Seeds whose models commit an end-of-sequence token early in many rows, so that stopping is tested.
MODELS = [random_model(seed) for seed in range(3)]


@pytest.mark.parametrize("kind", CASES)
def test_published_loops_give_the_same(llada_tiny, kind):
    for case in CASES[kind]:
        [generation] = generate(llada_tiny, [case["prompt"]], decoding_of(case))
        assert_agrees(generation, case)


def test_published_loops_give_the_same_in_one_batch(llada_tiny):
    """Run cases with equal settings together, in fewer slots than there are cases."""
    groups: dict[DecodingConfig, list[dict]] = {}
    for case in (case for cases in CASES.values() for case in cases):
        groups.setdefault(decoding_of(case), []).append(case)
    assert min(len(group) for group in groups.values()) > 2
    for decoding, group in groups.items():
        generations = generate(llada_tiny, [case["prompt"] for case in group], decoding, batch_size=2)
        for case, generation in zip(group, generations, strict=True):
            assert_agrees(generation, case)


prompts = st.lists(st.lists(st.integers(2, 49), min_size=1, max_size=12), min_size=1, max_size=6)


@given(
    prompts,
    st.sampled_from(MODELS),
    st.sampled_from([None, 0.5, 0.9]),
    st.sampled_from(
        [
            *itertools.product(["sequential", "multi_block", "revising"], ["none", "prefix", "dual"]),
            *itertools.product(["pipelined"], ["none", "exact"]),
        ]
    ),
    st.integers(0, 5),
)
def test_drawn_tokens_do_not_depend_on_batch_mates(prompts, model, top_p, mode_and_cache, seed):
    mode, cache = mode_and_cache
    decoding = DecodingConfig(
        gen_length=16,
        block_length=8,
        rule="confidence",
        threshold=0.6,
        mode=mode,
        cache=cache,
        temperature=1.0,
        top_p=top_p,
        seed=seed,
    )
    together = generate(model, prompts, decoding, batch_size=3)
    alone = [generate(model, [prompt], decoding)[0] for prompt in prompts]
    assert [(each.tokens, each.nfe) for each in together] == [(each.tokens, each.nfe) for each in alone]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mode": "multi_block", "cache": "dual"},
        {"mode": "pipelined", "cache": "exact"},
        {"mode": "revising", "cache": "dual", "rule": "entropy"},
        {"stop_at_eos": False, "cache": "prefix"},
    ],
)
def test_each_response_is_reported_once_as_soon_as_it_is_whole(settings):
    """Longest prompts first, several in one forward pass, and not all at the end."""
    prompts = [[4 + row] * (1 + row % 5) for row in range(12)]
    decoding = DecodingConfig(gen_length=16, block_length=8, threshold=1.5, **settings)
    reported, forwards, at_forward = {}, 0, []

    def count(steps):
        nonlocal forwards
        forwards += 1

    def finished(row, generation):
        assert row not in reported
        reported[row] = generation
        at_forward.append(forwards)

    generations = generate(MODELS[1], prompts, decoding, 5, observe=count, finished=finished)
    assert [reported[row] for row in range(len(prompts))] == generations
    assert at_forward[0] < forwards
    assert sorted(at_forward) == at_forward
    alone = {}
    assert generate(MODELS[1], prompts, decoding, 5, finished=alone.__setitem__) == generations
    assert alone == reported


def test_seeds_matter_and_low_temperature_is_greedy():
    def tokens(**sampling):
        decoding = DecodingConfig(gen_length=16, block_length=8, rule="steps", steps=16, **sampling)
        return generate(MODELS[0], [[5, 6, 7]], decoding)[0].tokens

    assert tokens(temperature=1.0, seed=1) == tokens(temperature=1.0, seed=1)
    assert tokens(temperature=1.0, seed=1) != tokens(temperature=1.0, seed=2)
    assert tokens(temperature=1e-4, seed=1) == tokens()


@given(prompts, st.sampled_from(MODELS))
def test_commit_steps_rebuild_every_canvas(prompts, model):
    """The model's predictions for the canvas of each recorded step give the recorded commits."""
    decoding = DecodingConfig(gen_length=16, block_length=8, rule="entropy", threshold=1.0, stop_at_eos=False)
    for prompt, generation in zip(prompts, generate(model, prompts, decoding), strict=True):
        tokens, steps = torch.tensor(generation.tokens), torch.tensor(generation.commit_step)
        assert set(generation.commit_step) == set(range(generation.nfe))
        for step in range(generation.nfe):
            canvas = torch.where(steps < step, tokens, model.config.mask_token_id)
            with torch.no_grad():
                logits = model(torch.cat([torch.tensor(prompt), canvas])[None])[0, len(prompt) :]
            fixed = steps == step
            probability = logits.softmax(-1)[fixed, tokens[fixed]]
            assert torch.allclose(probability, torch.tensor(generation.confidence)[fixed], atol=1e-5)


def test_stop_at_eos_counts_and_fills():
    """An early stop saves forward passes, fills with EOS, and counts tokens including the first EOS."""
    decoding = {"gen_length": 24, "block_length": 8, "rule": "steps", "steps": 24}
    prompts = [[start] for start in range(3, 40)]
    stopped = full = 0
    for model in MODELS:
        earlier = generate(model, prompts, DecodingConfig(**decoding))
        later = generate(model, prompts, DecodingConfig(**decoding, stop_at_eos=False))
        for early, late in zip(earlier, later, strict=True):
            if 2 in late.tokens[:16]:
                end = late.tokens.index(2) + 1
                assert early.tokens[:end] == late.tokens[:end]
                assert early.num_tokens == end
                assert early.nfe < late.nfe
                assert max(early.commit_step) == early.nfe - 1
                stopped += 1
            elif 2 not in late.tokens:
                assert (early.tokens, early.commit_step) == (late.tokens, late.commit_step)
                assert early.num_tokens == 24
                full += 1
    assert stopped > 3
    assert full > 3


@pytest.mark.parametrize("decoding", [{}, {"mode": "pipelined", "threshold": 1.5}])
def test_a_row_ends_at_any_end_token(decoding):
    """With one more end token, tokens up to it are unchanged, and EOS follows."""
    decoding = DecodingConfig(gen_length=24, block_length=8, **decoding)
    prompts = [[start] for start in range(3, 40)]
    shorter = 0
    for seed in range(3):
        for one, several in zip(
            generate(random_model(seed), prompts, decoding),
            generate(random_model(seed, end_token_ids=(7, 31, 12)), prompts, decoding),
            strict=True,
        ):
            ends = [at for at, token in enumerate(several.tokens) if token in (2, 7, 31, 12)]
            assert several.num_tokens == (ends[0] + 1 if ends else 24)
            assert several.tokens[: several.num_tokens] == one.tokens[: several.num_tokens]
            filled = [at for at in range(24) if several.confidence[at] == 0]
            assert {several.tokens[at] for at in filled} <= {2}
            shorter += several.nfe < one.nfe
    assert shorter > 10


def test_mask_token_is_never_chosen(tiny_model):
    model = random_model(4)
    with torch.no_grad():
        model.lm_head.weight[1] = 10 * model.lm_head.weight.abs().max()
        model.lm_head.weight[1] *= model.lm_head.weight[7].sign()
    decoding = DecodingConfig(gen_length=16, block_length=8, rule="entropy", threshold=2.0)
    with torch.no_grad():
        assert (model(torch.tensor([[5, 6] + [1] * 16])).argmax(-1) == 1).any(), "the mask must tempt"
    assert 1 not in generate(model, [[5, 6]], decoding)[0].tokens


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([5] * 60, r"prompt 1 has 60 tokens; with gen_length=24 .* takes at most 40"),
        ([5, 50], r"prompt 1 holds token id 50; valid ids are 0 to 49"),
        ([5, -1], r"prompt 1 holds token id -1"),
        ([5, 1], r"prompt 1 holds token id 1; .* without the mask 1"),
    ],
)
def test_bad_prompts_are_named(tiny_model, prompt, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_model, [[5], prompt], DecodingConfig(gen_length=24, block_length=8))


def test_prompts_may_be_lists_tensors_or_arrays(tiny_model):
    decoding = DecodingConfig(gen_length=8, block_length=8)
    expected = generate(tiny_model, [[5, 6], [7, 8]], decoding)
    ids = torch.tensor([[5, 6], [7, 8]])
    for prompts in (
        ids,
        ids.int(),
        ids.numpy(),
        ids.numpy().astype(np.uint8),
        [*ids],
        [*ids.numpy()],
        [[*row] for row in ids],
        [[*row] for row in ids.numpy()],
        ((5, 6), (7, 8)),
    ):
        assert generate(tiny_model, prompts, decoding) == expected
    assert generate(tiny_model, torch.zeros(0, 4, dtype=torch.int64), decoding) == []


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([5, 6], r"prompt 0 is 5: give a list of prompts, .* such as \[\[5, 6\]\]"),
        ("Tom", "prompts is a str: give lists of token ids, .* dparallel.complete takes texts"),
        (["Tom"], "prompt 0 is a text: give its token ids, or use dparallel.complete"),
        ([[5, "6"]], "prompt 0 holds '6', which is no token id"),
        ([[5], [True]], "prompt 1 holds True, which is no token id"),
        ([[5, 6.0]], "prompt 0 holds 6.0, which is no token id"),
        ([[5, None]], "prompt 0 holds None, which is no token id"),
        (torch.tensor([5, 6]), r"prompts has shape \(2,\): give \(B, L\)"),
        (torch.tensor([[5.0, 6.0]]), "prompt 0 is of dtype torch.float32: give token ids"),
        (np.array([[True, False]]), "prompt 0 is of dtype bool: give token ids"),
        ([torch.tensor([[5, 6]])], r"prompt 0 has shape \(1, 2\): give its token ids as \(L,\)"),
        ({"input_ids": [[5]]}, "prompts is a dict: give lists of token ids"),
        (5, "prompts is a int: give a list of lists"),
        (iter([[5]]), "give a list of lists"),
    ],
)
def test_what_is_no_prompt_is_refused(tiny_model, prompts, message):
    with pytest.raises(DecodingError, match=message):
        generate(tiny_model, prompts, DecodingConfig(gen_length=8, block_length=8))


@pytest.mark.parametrize(
    ("prompt", "pad", "message"),
    [
        ([5, 6, 0], 0, r"prompt 1 ends with 1 of the padding token 0 \(pad_token_id\)"),
        ([0, 0, 5], 0, "prompt 1 begins with 2 of the padding token 0 .* without padding=True"),
        ([0], 0, "prompt 1 begins with 1 of the padding token 0"),
        ([5, 0, 6], 0, None),
        ([0, 5, 0], None, None),
        ([5, 6, 2, 2], 2, "prompt 1 ends with 2 of the padding token 2"),
        ([2, 2, 5], 2, "prompt 1 begins with 2 of the padding token 2"),
        ([2, 5, 6, 2], 2, None),  # the end of a text, which pads as well
        ([3, 5], 3, None),  # its beginning
        ([], 0, None),
    ],
)
def test_padding_is_not_read_as_text(prompt, pad, message):
    model = random_model(pad_token_id=pad, bos_token_id=3)
    decoding = DecodingConfig(gen_length=8, block_length=8)
    if message is None:
        assert len(generate(model, [[5], prompt], decoding)) == 2
        return
    with pytest.raises(DecodingError, match=message):
        generate(model, [[5], prompt], decoding)


def test_padded_ids_of_a_tokenizer_are_refused(tiny_model):
    tokenizer = build_tokenizer()
    padded = tokenizer(["Tom has 7", "Tom"], padding=True)
    decoding = DecodingConfig(gen_length=8, block_length=8)
    with pytest.raises(DecodingError, match="of the padding token 0"):
        generate(tiny_model, padded.input_ids, decoding)
    with pytest.raises(DecodingError, match="BatchEncoding: give lists of token ids"):
        generate(tiny_model, padded, decoding)
    assert len(generate(tiny_model, tokenizer(["Tom has 7", "Tom"]).input_ids, decoding)) == 2


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True, float("nan"), float("inf")])
def test_a_batch_size_is_a_count(tiny_model, batch_size):
    with pytest.raises(DecodingError, match=f"batch_size={batch_size}: give a whole number of at least 1"):
        generate(tiny_model, [[5]], DecodingConfig(gen_length=8, block_length=8), batch_size=batch_size)


def test_settings_have_a_default(tiny_model):
    with pytest.raises(DecodingError, match="gen_length=256 is longer than this model's canvas"):
        generate(tiny_model, [[5]])
    [generation] = generate(random_model(max_position_embeddings=260), [[5]])
    assert len(generation.tokens) == 256


def test_bad_model_ids_and_batch_size(tiny_model):
    decoding = DecodingConfig(gen_length=8, block_length=8)
    with pytest.raises(ValueError, match="mask_token_id=99 is not in its vocabulary"):
        generate(random_model(mask_token_id=99), [[5]], decoding)
    with pytest.raises(ValueError, match="eos_token_id=None"):
        generate(random_model(eos_token_id=None), [[5]], decoding)
    with pytest.raises(ValueError, match="batch_size=0"):
        generate(tiny_model, [[5]], decoding, batch_size=0)
    assert generate(tiny_model, [], decoding) == []


@pytest.mark.parametrize(
    ("model", "mode", "message"),
    [
        (
            {},
            "autoregressive",
            "that states no attention_pattern .* mode='sequential' or 'multi_block' or 'revising' or "
            "'pipelined'",
        ),
        (
            {"attention_pattern": "full"},
            "pipelined",
            "attention_pattern='full' .* with mode='sequential' or 'multi_block' or 'revising'$",
        ),
        ({"attention_pattern": "causal"}, "autoregressive", "predicts_next is False"),
        ({"attention_pattern": "causal"}, "sequential", "decoded with mode='autoregressive'"),
        ({"attention_pattern": "block_causal"}, "sequential", "decoded with mode='pipelined'"),
        ({"attention_pattern": "block_causal"}, "multi_block", "decoded with mode='pipelined'"),
        ({"attention_pattern": "block_causal"}, "revising", "mode='revising' .* with mode='pipelined'"),
    ],
)
def test_a_model_is_decoded_as_it_was_trained_to_attend(model, mode, message):
    shape = {"gen_length": 8, "mode": mode} | ({} if mode == "autoregressive" else {"block_length": 8})
    with pytest.raises(ValueError, match=message):
        generate(random_model(**model), [[5]], DecodingConfig(**shape))


def test_damaged_weights_are_not_taken_for_certainty():
    model = random_model(5)
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(ValueError, match="logits are NaN or infinite: its weights are damaged"):
        generate(model, [[5, 6]], DecodingConfig(gen_length=8, block_length=8))


@pytest.mark.parametrize(
    "settings",
    [
        {"rule": "steps", "block_length": 8, "steps": 16},
        {"rule": "entropy", "block_length": 8},
        {"rule": "dream_entropy", "steps": 1},  # in more steps, the order depends on the temperature
        {"rule": "dream_topk_margin", "steps": 1},
    ],
)
def test_the_lowest_temperature_is_greedy(settings):
    """Below it, 1 / T overflows in float32, and the first token of the vocabulary would be sampled."""
    model = random_model(3)
    [greedy] = generate(model, [[5, 6]], DecodingConfig(gen_length=16, **settings))
    drawing = DecodingConfig(gen_length=16, **settings, temperature=MIN_TEMPERATURE, seed=1)
    [drawn] = generate(model, [[5, 6]], drawing)
    assert drawn.tokens == greedy.tokens


@pytest.mark.parametrize("temperature", [1e3, MAX_TEMPERATURE])
def test_the_highest_temperature_draws_evenly(temperature):
    """Above it, T overflows in float32, and the first token of the vocabulary would be sampled."""
    model = random_model(3)
    drawing = DecodingConfig(
        gen_length=32, block_length=8, temperature=temperature, seed=1, stop_at_eos=False
    )
    [drawn] = generate(model, [[5, 6]], drawing)
    assert len(set(drawn.tokens)) > 10


def test_the_lowest_top_p_is_greedy():
    """Below it, no token would be left, and the first token of the vocabulary would be sampled."""
    model = random_model(3)
    [greedy] = generate(model, [[5, 6]], DecodingConfig(gen_length=16, block_length=8))
    drawing = DecodingConfig(gen_length=16, block_length=8, temperature=1.0, top_p=MIN_TOP_P, seed=1)
    [drawn] = generate(model, [[5, 6]], drawing)
    assert drawn.tokens == greedy.tokens
