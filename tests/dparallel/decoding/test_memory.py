"""A batch that does not fit into memory is reduced, or raises an error that says what would fit."""

import logging

import pytest
import torch

from dparallel import DecodingConfig, generate
from dparallel.decoding import memory
from dparallel.decoding.memory import row_bytes, rows_that_fit
from tests.conftest import random_model

DECODING = DecodingConfig(gen_length=16, block_length=8)


def test_bytes_of_a_row_by_hand():
    """Canvas 20, hidden 32, feed-forward 64, 2 layers, vocabulary 50, float32, blocks of 8."""
    config = random_model().config
    layer, rotated, predictions = 20 * (4 * 32 + 3 * 64) * 4, 20 * 8 * 32 * 4, 8 * 50 * (4 + 20)
    assert row_bytes(config, 20, DECODING, torch.float32) == layer + rotated + predictions
    cached = DECODING.model_copy(update={"cache": "dual"})
    store = 2 * 2 * 20 * 32 * 4  # keys and values, layers, positions, width, bytes
    assert row_bytes(config, 20, cached, torch.float32) == layer + rotated + predictions + store
    drawn = cached.model_copy(update={"cache": "none", "temperature": 1.0, "top_p": 0.9})
    assert row_bytes(config, 20, drawn, torch.float32) == layer + rotated + predictions + 8 * 50 * 48
    for cut in ({"top_p": None, "top_k": 5}, {"top_k": 5}):
        assert row_bytes(config, 20, drawn.model_copy(update=cut), torch.float32) == row_bytes(
            config, 20, drawn, torch.float32
        )
    half = row_bytes(config, 20, cached, torch.bfloat16)
    assert half == layer // 2 + rotated + 8 * 50 * (2 + 20) + store // 2


def test_a_batch_that_does_not_fit_is_made_smaller_with_a_warning(tiny_model, monkeypatch, caplog):
    prompts = [[5, 6, 7, number] for number in range(3, 13)]
    expected = [each.tokens for each in generate(tiny_model, prompts, DECODING)]
    three_rows = 3.5 * row_bytes(tiny_model.config, 20, DECODING, torch.float32) / memory.USABLE
    monkeypatch.setattr(memory, "free_bytes", lambda device: three_rows)
    together = []
    with caplog.at_level(logging.WARNING):
        generations = generate(tiny_model, prompts, DECODING, 8, lambda steps: together.append(len(steps)))
    assert [each.tokens for each in generations] == expected
    assert max(together) == 3
    assert "a batch of 8 does not fit into memory; decoding 3 rows at a time" in caplog.text


def test_one_row_too_many_is_an_error(tiny_model, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    with pytest.raises(MemoryError, match=r"one row of 17 tokens needs about .* lower gen_length=16"):
        generate(tiny_model, [[5]], DECODING)


def test_free_memory_is_read_from_the_machine(tiny_model):
    assert rows_that_fit(tiny_model, 64, DECODING) > 100
