"""Compiled steps give the same tokens. Compilation takes seconds per shape, so only few shapes are tested."""

from functools import partial

import pytest
import torch

from dparallel import DecodingConfig, generate
from dparallel.decoding import compiled
from dparallel.decoding.denoise import denoise
from tests.conftest import random_model
from tests.dparallel.rules.fitted import random_commit_rule

PROMPTS = [[5, 6, 7], [8], [9, 10]]


def equal_tokens(device: str, **settings) -> None:
    model = random_model(3, num_hidden_layers=1).to(device)
    decoding = DecodingConfig(gen_length=16, block_length=8, rule="entropy", threshold=1.0, **settings)
    plain = generate(model, PROMPTS, decoding, batch_size=2)
    compiled = generate(model, PROMPTS, decoding.model_copy(update={"compile": True}), batch_size=2)
    assert [(each.tokens, each.commit_step, each.nfe) for each in compiled] == [
        (each.tokens, each.commit_step, each.nfe) for each in plain
    ]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A name for each step that is made; steps have the shapes of compiled ones, without compilation."""
    steps: list[str] = []
    monkeypatch.setattr(compiled, "compiled_denoise", lambda device: steps.append(str(device)) or denoise)
    return steps


def test_a_step_and_its_workspace_are_kept_for_the_next_call(made):
    """They serve other prompts and seeds of the same model, and nothing that differs in a constant."""
    model = random_model(3)
    shape = {"gen_length": 16, "block_length": 8, "cache": "dual", "temperature": 1.0, "compile": True}
    decoding = DecodingConfig(**shape, threshold=1.0, seed=1)
    first = generate(model, PROMPTS, decoding, 2)
    assert (len(made), compiled.kept_bytes(model)) == (1, 2 * 2 * 3 * 64 * 32 * 4)
    generate(model, [[11], [12, 13], [14]], decoding.model_copy(update={"seed": 2}), 2)
    assert generate(model, PROMPTS, decoding, 2) == first
    assert len(made) == 1
    generate(model, PROMPTS, decoding.model_copy(update={"threshold": 2.0}), 2)
    assert len(made) == 2


def test_a_step_is_not_kept_for_weights_that_move_adapters_or_after_a_failure(made):
    decoding = DecodingConfig(gen_length=16, block_length=8, threshold=1.0, compile=True)
    model = random_model(3)
    generate(model, PROMPTS, decoding)
    model.lm_head.weight = torch.nn.Parameter(2 * model.lm_head.weight.detach())
    plain = generate(model, PROMPTS, decoding.model_copy(update={"compile": False}))
    assert [each.tokens for each in generate(model, PROMPTS, decoding)] == [each.tokens for each in plain]
    assert len(made) == 2

    def fail(steps):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS, decoding, observe=fail)
    generate(model, PROMPTS, decoding)
    assert len(made) == 3
    adapted = random_model(3)
    adapted.lm_head = LoraLinear(adapted.lm_head)
    for _ in range(2):
        generate(adapted, PROMPTS, decoding)
    assert len(made) == 5


def test_a_step_is_not_kept_for_another_commit_rule(made):
    """Its weights are in the workspace, and captured graphs read them."""
    model = random_model(3)
    decoding = DecodingConfig(gen_length=16, block_length=8, rule="learned", threshold=0.5, compile=True)
    for seed in (1, 2, 2):
        model.commit_rule = model.commit_rule if len(made) == seed else random_commit_rule(seed)
        plain = generate(model, PROMPTS, decoding.model_copy(update={"compile": False}))
        assert [each.commit_step for each in generate(model, PROMPTS, decoding)] == [
            each.commit_step for each in plain
        ]
        assert len(made) == seed


class LoraLinear(torch.nn.Module):
    """A module that may compute something else in the next call."""

    def __init__(self, base: torch.nn.Module):
        super().__init__()
        self.base = base

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.base(hidden)


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


@pytest.mark.gpu
def test_kept_cuda_graphs_decode_other_prompts():
    model = random_model(3, num_hidden_layers=1).to("cuda")
    plain = DecodingConfig(gen_length=16, block_length=8, threshold=1.0, cache="dual")
    for prompts in (PROMPTS, [[11, 12], [13], [14, 15, 16]], PROMPTS):
        expected = generate(model, prompts, plain, batch_size=2)
        graphs = generate(model, prompts, plain.model_copy(update={"compile": True}), batch_size=2)
        assert [each.tokens for each in graphs] == [each.tokens for each in expected]
