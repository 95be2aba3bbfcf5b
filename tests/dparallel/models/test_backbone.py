import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import random_model

MODEL = random_model(num_key_value_heads=2, qkv_bias=True)


@torch.no_grad()
def test_head_runs_only_where_read():
    ids = torch.randint(3, 50, (3, 20))
    logits = MODEL(ids)
    where = torch.tensor([[0, 5], [3, 3], [19, 1]])
    assert torch.allclose(MODEL(ids, logits_at=where), logits[torch.arange(3)[:, None], where], atol=1e-5)
    chosen = torch.rand(3, 20) < 0.3
    assert torch.allclose(MODEL(ids, logits_at=chosen), logits[chosen], atol=1e-5)
    assert MODEL(ids, logits_at=chosen).shape == (int(chosen.sum()), 50)
    chosen[1] = False  # a row that reads nothing, then none that reads anything
    assert torch.allclose(MODEL(ids, logits_at=chosen), logits[chosen], atol=1e-5)
    assert MODEL(ids, logits_at=torch.zeros_like(chosen)).shape == (0, 50)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(0, 20), st.integers(0, 100))
def test_padding_is_invisible(length, padding, seed):
    ids = torch.randint(3, 50, (1, length), generator=torch.Generator().manual_seed(seed))
    padded = torch.cat([ids, torch.full((1, padding), 7)], dim=1)
    visible = torch.arange(length + padding)[None] < length
    with torch.no_grad():
        assert torch.allclose(MODEL(padded, visible)[:, :length], MODEL(ids), atol=1e-4)


@torch.no_grad()
def test_square_masks_decide_who_sees_whom():
    ids = torch.randint(3, 50, (2, 12))
    causal = torch.ones(12, 12).tril().bool().expand(2, 12, 12)
    changed = ids.clone()
    changed[:, 8] = (ids[:, 8] - 3 + 1) % 47 + 3
    before, after = MODEL(ids, causal), MODEL(changed, causal)
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.equal(before[:, 8:], after[:, 8:])
    assert not torch.equal(MODEL(ids)[:, :8], MODEL(changed)[:, :8])
    everyone = torch.ones(2, 12, 12).bool()
    assert torch.allclose(MODEL(ids, everyone), MODEL(ids), atol=1e-5)


def test_masks_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 11\).*\(B, L\) = \(2, 12\)"):
        MODEL(torch.zeros(2, 12).long(), torch.ones(2, 11).bool())
    with pytest.raises(ValueError, match="float32; give bool"):
        MODEL(torch.zeros(2, 12).long(), torch.zeros(2, 12))


def test_gradient_checkpointing_changes_nothing():
    model = random_model().train()
    ids = torch.randint(3, 50, (2, 12))
    model(ids).square().mean().backward()
    plain = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(ids).square().mean().backward()
    for name, weight in model.named_parameters():
        assert torch.allclose(weight.grad, plain[name], atol=1e-6), name
