"""The mode `revising`: hand-worked numbers, a model with given predictions, bounds, and sampling."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dparallel import DecodingConfig, generate
from dparallel.decoding.canvas import Step
from dparallel.decoding.revision import changed, final, settled, soft_embeddings, soft_inputs
from tests.dparallel.decoding.test_against_oracle import EOS, MODELS, assert_equals_the_oracle, prompts

SHAPE = {"mode": "revising", "gen_length": 24, "block_length": 8}


def test_soft_embeddings_by_hand():
    """Halfway between (3, 4) and (0, -1) is (1.5, 1.5); the norm is halfway between 5 and 1."""
    own, mask = torch.tensor([[3.0, 4.0]] * 3), torch.tensor([0.0, -1.0])
    soft = soft_embeddings(own, mask, torch.tensor([0.5, 1.0, 0.0]))
    assert soft.tolist() == [pytest.approx(each) for each in ([3 / 2**0.5] * 2, [3.0, 4.0], [0.0, -1.0])]
    opposite = soft_embeddings(torch.tensor([[0.0, 1.0]]), mask, torch.tensor([0.5]))
    assert opposite.tolist() == [[0.0, 0.0]], "without a direction"
    assert soft_embeddings(own.bfloat16(), mask.bfloat16(), torch.ones(3)).dtype == torch.bfloat16


def test_probabilities_count_in_steps():
    """Differences of a rounding error do not reach the next forward pass: 0.5 +- 1/300 are 64/128."""
    embedding = torch.nn.Embedding.from_pretrained(torch.tensor([[0.0, -1.0], [3.0, 4.0]]))

    def soft(p):
        block = torch.tensor([[1]]), torch.tensor([[True]]), torch.tensor([[p]])
        return soft_inputs(embedding, 0, torch.tensor([[1]]), torch.tensor([[0]]), *block).tolist()

    assert soft(0.5) == soft(0.5 + 1 / 300) == soft(0.5 - 1 / 300) != soft(0.5 + 1 / 200)


def test_only_committed_positions_of_the_block_are_soft():
    embedding = torch.nn.Embedding.from_pretrained(torch.tensor([[0.0, -1.0], [3.0, 4.0], [7.0, 7.0]]))
    block = torch.tensor([[1, 1, 0]]), torch.tensor([[True, True, False]]), torch.tensor([[0.5, 1.0, 0.25]])
    for places, expected in (
        ([-1, 0, 1, 2, 3], ([7, 7], [3 / 2**0.5] * 2, [3, 4], [0, -1], [3, 4])),
        ([0, 0, 9, 1], ([3 / 2**0.5] * 2, [3 / 2**0.5] * 2, [7, 7], [3, 4])),  # an input may occur twice
    ):
        ids = torch.tensor([[{-1: 2, 2: 0, 9: 2}.get(place, 1) for place in places]])
        soft = soft_inputs(embedding, 0, ids, torch.tensor([places]), *block)[0].tolist()
        assert soft == [pytest.approx(each) for each in expected]


def flags(*values: int) -> np.ndarray:
    return np.array([values], dtype=bool)


def test_what_a_forward_pass_changes_by_hand():
    """Masked and selected, masked and not selected, changed, confirmed, and a position that fills up."""
    read, masked, fixed = flags(1, 1, 1, 1, 0), flags(1, 1, 0, 0, 0), flags(1, 0, 0, 0, 0)
    new = changed(np.full((1, 5), 5), read, masked, fixed, np.array([[1, 1, 7, 5, 7]]))
    assert new.astype(int).tolist() == [[1, 0, 1, 0, 0]]


@pytest.mark.parametrize(
    ("sure", "new", "expected"),
    [
        ((1, 1), (1, 0), True),  # sure, whatever changed
        ((1, 0), (1, 0), False),
        ((0, 0), (0, 0), True),  # nothing changed
    ],
)
def test_a_block_settles_by_hand(sure, new, expected):
    """The last position only fills up."""
    assert settled(flags(*sure, 0), flags(1, 1, 0), flags(*new, 0)).tolist() == [expected]


def test_final_positions_by_hand():
    """A final block, a complete one that may be revised, and one with a mask."""
    steps = np.array([[0, 2, 3, 3, 4, -1]])
    assert final(steps, np.array([[0, 1, 0]])).astype(int).tolist() == [[1, 1, 0, 0, 0, 0]]
    assert final(steps, np.array([[0, 0, 0]])).astype(int).tolist() == [[1, 1, 1, 1, 0, 0]]


class Scripted(torch.nn.Module):
    """Predicts given tokens of given probabilities, a list for each forward pass, whatever the canvas."""

    def __init__(self, model, passes):
        super().__init__()
        self.config, self.dtype, self.device = model.config, model.dtype, model.device
        self.commit_rule = None
        self.embedding, self.passes, self.inputs = model.embedding, iter(passes), []

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, visible, at, positions, cache, levels, inputs):
        self.inputs.append((input_ids[0].tolist(), inputs[0]))
        logits = torch.full((1, 4, 50), -1e9)
        for place, (token, p) in enumerate(next(self.passes)):
            logits[0, place, 10:49] = math.log((1 - p) / 39)
            logits[0, place, token] = math.log(p)
        return logits


PASSES = [
    [(5, 0.75), (6, 0.75), (7, 0.25), (8, 0.75)],  # the run is 5 6
    [(5, 0.75), (9, 0.625), (7, 0.375), (8, 0.75)],  # 6 becomes 9; the leftmost masked one, 7
    [(5, 0.75), (9, 0.75), (7, 0.75), (8, 0.75)],  # 8, the last one
    [(5, 0.75), (6, 0.75), (7, 0.75), (8, 0.75)],  # 9 becomes 6 again
]


@pytest.mark.parametrize(
    ("further", "settings", "nfe", "tokens", "commit_step", "confidence"),
    [
        ([PASSES[3]], {}, 5, [5, 6, 7, 8], [0, 3, 1, 2], [0.75, 0.75, 0.375, 0.75]),  # then unchanged
        ([], {"final_threshold": 0.7}, 3, [5, 9, 7, 8], [0, 1, 1, 2], [0.75, 0.625, 0.375, 0.75]),
        ([], {"revision_passes": 0}, 3, [5, 9, 7, 8], [0, 1, 1, 2], [0.75, 0.625, 0.375, 0.75]),
        ([], {"revision_passes": 1}, 4, [5, 6, 7, 8], [0, 3, 1, 2], [0.75, 0.75, 0.375, 0.75]),
    ],
)
def test_a_block_by_hand(further, settings, nfe, tokens, commit_step, confidence):
    """Which of four tokens is committed, changed and final by which forward pass, and how much it counts."""
    model = Scripted(MODELS[0], [*PASSES, *further])
    decoding = DecodingConfig(mode="revising", gen_length=4, block_length=4, threshold=0.5, **settings)
    steps: list[Step] = []
    [generation] = generate(model, [[3]], decoding, observe=steps.extend)
    assert (generation.nfe, generation.tokens, generation.commit_step) == (nfe, tokens, commit_step)
    assert generation.confidence == pytest.approx(confidence)
    assert [step.commit for step in steps][:3] == [
        [True, True, False, False],
        [False, True, True, False],
        [False, False, False, True],
    ]
    third, inputs = model.inputs[2]
    assert third == [3, 5, 9, 7, 1]
    table, sure = MODELS[0].embedding.weight, torch.tensor([1.0, 0.75, 0.625, 0.375, 0.0])
    assert torch.allclose(inputs, soft_embeddings(table[third], table[1], sure), atol=1e-6)


@given(
    prompts,
    st.sampled_from(MODELS),
    st.floats(0, 0.6),
    st.floats(0, 1),
    st.integers(0, 4),
    st.sampled_from([4, 8, 12, 24]),
)
def test_it_always_ends(prompts, model, threshold, final_threshold, passes, block_length):
    decoding = DecodingConfig(
        **{**SHAPE, "block_length": block_length},
        threshold=threshold,
        final_threshold=final_threshold,
        revision_passes=passes,
        stop_at_eos=False,
    )
    for generation in generate(model, prompts, decoding, 3):
        assert generation.nfe <= decoding.most_forwards == 24 + 24 // block_length * passes
        assert min(generation.confidence) > 0
        assert model.config.mask_token_id not in generation.tokens


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("model", [MODELS[3], MODELS[5]], ids=["heads", "predicts_next"])
def test_rows_in_blocks_of_their_own_equal_the_oracle(model, cache):
    """Of different lengths and in different blocks, so that some forward passes compute an input twice."""
    decoding = DecodingConfig(**SHAPE, threshold=0.2, final_threshold=0.5, revision_passes=3, cache=cache)
    rows = [[5, 6, 7, 9], [8], [3, 4]]
    for prompt, generation in zip(rows, generate(model, rows, decoding, 2), strict=True):
        assert_equals_the_oracle(generation, model, prompt, decoding)


def test_tokens_do_change_and_oscillations_end():
    """Random models are not trained to correct themselves: many rows use all passes, others settle."""
    decoding = DecodingConfig(**SHAPE, threshold=0.05, stop_at_eos=False, revision_passes=6)
    rows = [[start, 5] for start in range(3, 20)]
    steps: list[Step] = []
    generations = generate(MODELS[1], rows, decoding, observe=steps.extend)
    commits = [
        (step.row, offset)
        for step in steps
        for offset, commit in zip(step.offsets, step.commit, strict=True)
        if commit
    ]
    assert len(commits) > len(set(commits)) + 20
    passes = [sum(step.row == row and step.offsets[0] == 0 for step in steps) for row in range(len(rows))]
    assert min(passes) < max(passes)
    assert_equals_the_oracle(generations[0], MODELS[1], rows[0], decoding)


def test_a_row_does_not_end_at_an_end_token_that_changes():
    """Only end tokens of final blocks count; decoding on changes nothing before them."""
    rows = [[start] for start in range(3, 40)]
    passing = ended = 0
    for model in MODELS[:3]:
        steps: list[Step] = []
        found = generate(model, rows, DecodingConfig(**SHAPE, threshold=0.05), observe=steps.extend)
        whole = generate(model, rows, DecodingConfig(**SHAPE, threshold=0.05, stop_at_eos=False))
        for row, (generation, full) in enumerate(zip(found, whole, strict=True)):
            count = generation.num_tokens
            assert (generation.tokens[:count], count) == (full.tokens[:count], full.num_tokens)
            ended += generation.nfe < full.nfe
            mine = [step for step in steps if step.row == row]
            committed = [
                token for step in mine for token, new in zip(step.tokens, step.commit, strict=True) if new
            ]
            passing += EOS in committed and EOS not in generation.tokens
    assert ended > 3
    assert passing > 3


def test_a_low_temperature_is_greedy_and_a_seed_decides():
    def tokens(**sampling):
        decoding = DecodingConfig(**SHAPE, threshold=0.2, **sampling)
        return [each.tokens for each in generate(MODELS[0], [[5, 6, 7], [8]], decoding)]

    assert tokens(temperature=1e-4, seed=1) == tokens()
    assert tokens(temperature=1.0, seed=1) == tokens(temperature=1.0, seed=1) != tokens()
    assert tokens(temperature=1.0, seed=1) != tokens(temperature=1.0, seed=2)


def test_a_position_keeps_its_random_numbers():
    """With a distribution that does not change, a drawn token does not either: one further pass is enough."""
    same = [[(5, 0.5), (6, 0.5), (7, 0.5), (8, 0.5)]] * 2
    decoding = DecodingConfig(
        mode="revising", gen_length=4, block_length=4, threshold=0.0, temperature=1.0, seed=1
    )
    for seed in range(8):
        [generation] = generate(Scripted(MODELS[0], same), [[3]], decoding.model_copy(update={"seed": seed}))
        assert generation.nfe == 2
        assert set(generation.commit_step) == {0}
