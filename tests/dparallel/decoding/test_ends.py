"""What follows an end-of-sequence token, and decoding without one, against tables worked by hand."""

import numpy as np
import pytest
import torch

from dparallel import DecodingConfig, generate
from dparallel.decoding.ends import behind_first
from dparallel.decoding.oracle import decode_one
from tests.conftest import random_model
from tests.dparallel.decoding.test_against_oracle import MODELS, assert_equals_the_oracle

MASK, EOS, TURN, PROMPT = 1, 2, 3, [5]


def test_positions_behind_the_first_end_token():
    ends = np.array([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=bool)
    assert behind_first(ends).astype(int).tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]]


class Scripted:
    """A model that predicts what a table says: by forward pass and position, probabilities of tokens."""

    def __init__(self, table, **shape):
        self.model = random_model(**shape)
        self.table = table
        self.seen: list[list[int]] = []  # the responses that the forward passes got
        self.model.forward = self.forward

    def forward(self, canvas, visible=None, read_at=None, *rest):
        probability = torch.full((1, canvas.shape[1], 50), 0.5 / 49)
        probability[..., 10] = 0.5
        for position, tokens in self.table[len(self.seen)].items():
            probability[0, len(PROMPT) + position] = (1 - sum(tokens.values())) / (50 - len(tokens))
            for token, p in tokens.items():
                probability[0, len(PROMPT) + position, token] = p
        self.seen.append(canvas[0, len(PROMPT) :].tolist())
        logits = probability.log()
        return logits if read_at is None else logits[0, read_at[0]][None]


# Blocks of 4; the second opens when a token of the first is committed. Pass 1 commits position 5, and
# position 1 since the first block must advance; pass 2 commits an end-of-sequence token at position 3.
TABLE = [
    {2: {7: 0.95}},
    {5: {8: 0.95}, 1: {9: 0.6}},
    {3: {EOS: 0.95}},
    {0: {6: 0.95}, 4: {11: 0.97}},
]
OPEN = {"mode": "multi_block", "block_add_threshold": 0.25, "rule": "confidence", "threshold": 0.9}


@pytest.mark.parametrize("decode", [lambda *given: generate(given[0], [given[1]], given[2])[0], decode_one])
@pytest.mark.parametrize("eos_fill", [None, "immediate"])
def test_filling_behind_an_end_token_by_hand(decode, eos_fill):
    scripted = Scripted(TABLE)
    decoding = DecodingConfig(gen_length=8, block_length=4, **OPEN, eos_fill=eos_fill)
    response = decode(scripted.model, PROMPT, decoding)
    assert (response.nfe, response.num_tokens) == (4, 4)
    m = MASK
    if eos_fill is None:
        assert scripted.seen[3] == [m, 9, 7, EOS, m, 8, m, m]
        assert response.tokens == [6, 9, 7, EOS, 11, 8, EOS, EOS]
        assert response.commit_step == [3, 1, 0, 2, 3, 1, 3, 3]
        confidence = [0.95, 0.6, 0.95, 0.95, 0.97, 0.95, 0, 0]
    else:  # the token at position 5 is replaced
        assert scripted.seen[3] == [m, 9, 7, EOS, EOS, EOS, EOS, EOS]
        assert response.tokens == [6, 9, 7, EOS, EOS, EOS, EOS, EOS]
        assert response.commit_step == [3, 1, 0, 2, 2, 2, 2, 2]
        confidence = [0.95, 0.6, 0.95, 0.95, 0, 0, 0, 0]
    assert response.confidence == pytest.approx(confidence, abs=1e-5)


def test_blocks_whose_tokens_are_replaced_are_computed_again():
    """With a cache, full blocks behind an end token are not recomputed; replaced tokens change them."""
    shape = {"gen_length": 24, "block_length": 8, "mode": "multi_block", "cache": "dual"}
    decoding = DecodingConfig(**shape, threshold=2.6, block_add_threshold=0.1, eos_fill="immediate")
    prompts = [[start, 5] for start in range(3, 11)]
    for model in MODELS:
        for prompt, response in zip(prompts, generate(model, prompts, decoding), strict=True):
            assert_equals_the_oracle(response, model, prompt, decoding)


def test_filled_positions_take_no_forward_pass():
    """One token per pass, from the right: after the end token at position 1 only position 0 is left."""
    table = [{5: {7: 0.9}}, {1: {EOS: 0.9}}, {3: {8: 0.9}}, {0: {6: 0.9}}]
    passes = {}
    for eos_fill in (None, "immediate"):
        scripted = Scripted(table)
        decoding = DecodingConfig(gen_length=6, block_length=6, threshold=0.0, eos_fill=eos_fill)
        passes[eos_fill] = generate(scripted.model, [PROMPT], decoding)[0].nfe
    assert passes == {None: 4, "immediate": 3}


@pytest.mark.parametrize("decode", [lambda *given: generate(given[0], [given[1]], given[2])[0], decode_one])
def test_a_suppressed_end_token_is_never_predicted(decode):
    """Its probability is shared by the others: 0.3 of 0.4. Another end token still ends the response."""
    table = [{0: {EOS: 0.6, 7: 0.3}, 1: {TURN: 0.9}}]
    scripted = Scripted(table, end_token_ids=[EOS, TURN])
    decoding = DecodingConfig(
        gen_length=2, block_length=2, rule="confidence", threshold=0.7, suppress_eos=True
    )
    response = decode(scripted.model, PROMPT, decoding)
    assert (response.tokens, response.commit_step) == ([7, TURN], [0, 0])
    assert response.confidence == pytest.approx([0.75, 0.9 / (1 - 0.1 / 49)], abs=1e-5)
    assert response.num_tokens == 2


def test_models_that_always_end_go_on_without_the_end_token():
    decoding = DecodingConfig(gen_length=16, block_length=8, threshold=1.0, suppress_eos=True)
    for seed in range(3):
        responses = generate(random_model(seed), [[5, 6], [7, 8, 9]], decoding)
        assert all(EOS not in response.tokens for response in responses)
