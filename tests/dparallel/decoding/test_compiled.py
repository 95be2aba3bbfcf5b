"""Compiled steps give the same tokens. Compilation takes seconds per shape, so only few shapes are tested."""

from functools import partial

import pytest
import torch

from dparallel import DecodingConfig, generate
from tests.conftest import random_model

PROMPTS = [[5, 6, 7], [8], [9, 10]]


def equal_tokens(device: str, **settings) -> None:
    model = random_model(3, num_hidden_layers=1).to(device)
    decoding = DecodingConfig(gen_length=16, block_length=8, rule="entropy", threshold=1.0, **settings)
    plain = generate(model, PROMPTS, decoding, batch_size=2)
    compiled = generate(model, PROMPTS, decoding.model_copy(update={"compile": True}), batch_size=2)
    assert [(each.tokens, each.commit_step, each.nfe) for each in compiled] == [
        (each.tokens, each.commit_step, each.nfe) for each in plain
    ]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"cache": "dual"}, {"mode": "pipelined"}])
def test_compiled_steps_on_the_cpu(settings, monkeypatch):
    """One graph per step; a graph break, which would leave parts uncompiled, is an error here."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, fullgraph=True))
    equal_tokens("cpu", **settings)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings", [{}, {"cache": "dual"}, {"mode": "multi_block", "cache": "prefix"}, {"mode": "pipelined"}]
)
def test_cuda_graphs(settings):
    equal_tokens("cuda", **settings)
