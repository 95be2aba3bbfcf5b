"""Probabilities of a trained model are closer to 1 than float32 resolves; their order must be correct."""

from pathlib import Path

import pytest

from dparallel import DecodingConfig, generate, load_model, load_tokenizer
from dparallel.config.problems import ProblemsConfig
from dparallel.decoding import compiled
from dparallel.decoding.denoise import denoise
from dparallel.problems.registry import load_problems
from tests.dparallel.decoding.test_against_oracle import by_the_oracle

TEACHER = Path(__file__).parents[3] / "teachers" / "tiny"
SHAPE = {"gen_length": 36, "block_length": 12}
SETTINGS = [
    {"rule": "steps", "steps": 36},
    {"rule": "steps", "steps": 9},
    {"rule": "confidence", "threshold": 1.0},
    {"rule": "margin", "threshold": 1.0},
    {"rule": "entropy", "threshold": 0.0},
    {"rule": "entropy_budget", "threshold": 0.3},
    {"rule": "entropy_bound", "threshold": 1e-6},
    {"rule": "frechet", "threshold": 0.999999},
    {"rule": "factor", "threshold": 1e-6},
    {"rule": "stability", "threshold": 0.9},
    {"rule": "stability", "threshold": 0.5, "stability_threshold": 1e-3},
    {"rule": "dream_entropy", "steps": 18, "block_length": 36},
    {"rule": "dream_maskgit_plus", "steps": 18, "block_length": 36},
    {"rule": "dream_topk_margin", "steps": 18, "block_length": 36},
    {"rule": "confidence", "threshold": 1.0, "mode": "multi_block", "cache": "dual"},
    {"rule": "contiguous", "threshold": 1.0},
    {"rule": "contiguous", "threshold": 0.3, "mode": "revising", "final_threshold": 1.0},
    {"rule": "entropy", "threshold": 2.0, "mode": "revising", "cache": "dual", "revision_passes": 2},
]


@pytest.fixture(scope="module")
def teacher():
    tokenizer = load_tokenizer(TEACHER)
    problems = load_problems(ProblemsConfig(benchmark="coins", split="validation", count=7))
    return load_model(TEACHER, device="cpu"), tokenizer([each.prompt for each in problems]).input_ids


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_every_row_equals_the_oracle(teacher, settings):
    model, prompts = teacher
    decoding = DecodingConfig(**{**SHAPE, **settings})
    for prompt, generation in zip(prompts, generate(model, prompts, decoding, 4), strict=True):
        expected = by_the_oracle(model, prompt, decoding)
        assert (generation.tokens, generation.nfe) == (expected.tokens, expected.nfe)
        assert generation.commit_step == expected.commit_step


@pytest.mark.parametrize("batch_size", [3, 5, 6])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("mode", ["sequential", "multi_block"])
def test_rows_that_fill_up_a_fixed_shape_change_nothing(teacher, monkeypatch, batch_size, cache, mode):
    """The shapes of compiled steps, without compilation."""
    model, prompts = teacher
    decoding = DecodingConfig(**SHAPE, threshold=0.6, mode=mode, cache=cache)
    prompts = [prompt[: len(prompt) - row] for row, prompt in enumerate(prompts)]
    expected = generate(model, prompts, decoding, batch_size)
    monkeypatch.setattr(compiled, "compiled_denoise", lambda device: denoise)
    shaped = generate(model, prompts, decoding.model_copy(update={"compile": True}), batch_size)
    assert [(each.tokens, each.commit_step, each.nfe) for each in shaped] == [
        (each.tokens, each.commit_step, each.nfe) for each in expected
    ]


def test_revised_rows_do_not_depend_on_the_shape_of_the_batch(teacher, monkeypatch):
    """Probabilities are fed back: without rounding, errors of float32 would decide some of these rows."""
    model, prompts = teacher
    decoding = DecodingConfig(**SHAPE, mode="revising", revision_passes=4)
    prompts = [prompt[: len(prompt) - row] for row, prompt in enumerate(prompts)]
    expected = generate(model, prompts, decoding, 3)
    monkeypatch.setattr(compiled, "compiled_denoise", lambda device: denoise)
    shaped = generate(model, prompts, decoding.model_copy(update={"compile": True}), 8)
    assert [(each.tokens, each.commit_step) for each in shaped] == [
        (each.tokens, each.commit_step) for each in expected
    ]
