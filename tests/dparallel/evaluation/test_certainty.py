import pytest
import torch

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.canvas import Step
from dparallel.decoding.generate import generate
from dparallel.evaluation.certainty import replay, suited

PROMPT = [10, 20, 30]


@pytest.mark.parametrize("mode", ["sequential", "multi_block", "revising", "pipelined"])
def test_replay_sees_the_very_probabilities_at_which_tokens_were_committed(tiny_model, mode) -> None:
    shape = {"gen_length": 24, "block_length": 8, "rule": "entropy", "threshold": 1.0}
    decoding = DecodingConfig(**shape, stop_at_eos=False, mode=mode)
    steps: list[Step] = []
    (generation,) = generate(tiny_model, [PROMPT], decoding, observe=steps.extend)
    certainty = replay(tiny_model, PROMPT, generation, decoding, steps)
    assert certainty.shape == (generation.nfe, 24)
    assert generation.nfe > 3
    at_commit = certainty[generation.commit_step, torch.arange(24)]
    torch.testing.assert_close(at_commit, torch.tensor(generation.confidence), atol=1e-5, rtol=0)


def test_replay_of_many_steps_equals_one_forward_at_a_time(tiny_model) -> None:
    decoding = DecodingConfig(gen_length=24, block_length=24, rule="steps", steps=24)
    (generation,) = generate(tiny_model, [PROMPT], decoding)
    certainty = replay(tiny_model, PROMPT, generation, decoding)
    mask = tiny_model.config.mask_token_id
    for step in range(generation.nfe):
        response = [
            token if committed < step else mask
            for token, committed in zip(generation.tokens, generation.commit_step, strict=True)
        ]
        with torch.inference_mode():
            probability = tiny_model(torch.tensor([PROMPT + response]))[0, len(PROMPT) :].softmax(-1)
            probability[:, mask] = 0
        torch.testing.assert_close(certainty[step], probability.amax(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("pattern", "mode", "shown"),
    [
        ("full", "pipelined", "sequential"),
        ("full", "multi_block", "multi_block"),
        ("block_causal", "pipelined", "pipelined"),
        (None, "pipelined", "pipelined"),
        ("block_causal", "revising", "pipelined"),
        ("causal", "pipelined", "autoregressive"),
    ],
)
def test_a_model_that_cannot_be_decoded_so_is_shown_in_a_mode_that_suits_it(pattern, mode, shown) -> None:
    decoding = DecodingConfig(gen_length=24, block_length=8, mode=mode, rule="contiguous", threshold=0.7)
    made = suited(decoding, pattern)
    assert made.mode == shown
    assert (made == decoding) == (shown == mode)
    if shown != "autoregressive":  # which has a rule of its own
        assert (made.rule, made.threshold, made.gen_length, made.block_length) == ("contiguous", 0.7, 24, 8)
