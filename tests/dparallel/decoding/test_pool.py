"""Rows of a pool equal those of `generate` alone, whatever joins and leaves beside them."""

import numpy as np
import pytest
import torch

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.generate import generate, row_seed
from dparallel.decoding.pool import Pool
from dparallel.models.backbone import DiffusionTransformer

SHAPE = {"gen_length": 16, "block_length": 8}
DECODINGS = [
    {"threshold": 0.5},
    {"rule": "confidence", "threshold": 0.3, "temperature": 0.8, "seed": 3},
    {"rule": "steps", "steps": 8, "cache": "dual"},
    {"mode": "multi_block", "threshold": 0.7, "cache": "prefix", "refresh_every": 3},
    {"rule": "stability", "threshold": 0.3, "stability_threshold": 0.5},
    {"rule": "contiguous", "threshold": 0.1, "mode": "revising", "cache": "dual", "revision_passes": 3},
]


@pytest.mark.parametrize("settings", DECODINGS, ids=lambda settings: settings.get("rule", "entropy"))
def test_rows_equal_generate_alone(tiny_model: DiffusionTransformer, settings: dict) -> None:
    """Prompts of growing and shrinking lengths join at random times; some rows leave before their end."""
    decoding = DecodingConfig(**SHAPE, **settings)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 50, length).tolist() for length in (0, 5, 2, 30, 1, 47, 12, 3)]
    pool = Pool(tiny_model, decoding)
    waiting, running, left = list(enumerate(prompts)), dict[int, int](), 0
    with torch.inference_mode():
        while waiting or running:
            while waiting and (not running or rng.random() < 0.5):
                row, prompt = waiting.pop(0)
                running[pool.join(prompt, row_seed(decoding.seed, prompt))] = row
            if len(running) > 2 and left < 2:
                slot = rng.choice(list(running))
                pool.leave([slot])
                waiting.append((running[slot], prompts[running.pop(slot)]))  # and starts again
                left += 1
            forward, done = pool.forward()
            slots = forward.rows
            look = pool.look(slots)
            for place in np.flatnonzero(done):
                row = running.pop(int(slots[place]))
                [alone] = generate(tiny_model, [prompts[row]], decoding)
                assert look.tokens[place].tolist() == alone.tokens
                assert look.commit_step[place].tolist() == alone.commit_step
                assert look.nfe[place] == alone.nfe
            pool.leave(slots[done].tolist())
    assert left == 2
    assert len(pool) == 0


def test_what_is_committed_counts_up_to_the_first_masked_position(tiny_model: DiffusionTransformer) -> None:
    pool = Pool(tiny_model, DecodingConfig(**SHAPE, threshold=0.5))
    with torch.inference_mode():
        pool.join([5, 6], 0)
        forward, _ = pool.forward()
        slots = forward.rows
        look = pool.look(slots)
    steps = look.commit_step[0].tolist()
    assert steps.index(-1) == look.committed[0]


def test_what_may_change_is_not_final(tiny_model: DiffusionTransformer) -> None:
    """Tokens count from the forward pass on that makes their block final, and do not change any more."""
    pool = Pool(tiny_model, DecodingConfig(**SHAPE, mode="revising", threshold=0.1, revision_passes=3))
    seen, full = [], 0
    with torch.inference_mode():
        pool.join([5, 6], 0)
        done = [False]
        while not done[0]:
            forward, done = pool.forward()
            slots = forward.rows
            look = pool.look(slots)
            seen.append((int(look.committed[0]), look.tokens[0].tolist()))
            full += look.committed[0] < 8 and (look.commit_step[0, :8] >= 0).all()
    assert full, "a block without masks is not final at once"
    assert sorted({count for count, _ in seen}) == [0, 8, 16]
    assert all(tokens[:count] == seen[-1][1][:count] for count, tokens in seen)
