import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dparallel.models.attention import block_levels
from dparallel.models.backbone import attend, level_block_mask
from tests.conftest import random_model

MODEL = random_model(num_key_value_heads=2, qkv_bias=True)
SHIFTED = random_model(num_key_value_heads=2, qkv_bias=True, predicts_next=True)


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


@settings(max_examples=30, deadline=None)
@given(st.data(), st.booleans())
def test_levels_are_a_square_mask(data, predicts_next):
    """With any levels: with and without selected positions, and with the kernel that skips empty blocks."""
    model = SHIFTED if predicts_next else MODEL
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 20))
    numbers = st.lists(st.integers(0, 5), min_size=length, max_size=length)
    levels = torch.tensor(data.draw(st.lists(numbers, min_size=rows, max_size=rows)))
    square = torch.tensor([[[k <= q for k in row] for q in row] for row in levels.tolist()])
    ids = torch.randint(3, 50, (rows, length), generator=torch.Generator().manual_seed(length))
    read = torch.randint(length, (rows, 4), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        expected = model(ids, square)
        assert torch.allclose(model(ids, levels=levels), expected, atol=1e-5)
        picked = expected[torch.arange(rows)[:, None], read]
        assert torch.allclose(model(ids, levels=levels, logits_at=read), picked, atol=1e-5)
        query, key, value = torch.randn(3, rows, 2, length, 8)
        skipping = attend(query, key, value, level_block_mask(levels))
        assert torch.allclose(skipping, attend(query, key, value, square[:, None]), atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gpu_training_skips_what_is_not_seen(dtype, checkpointing):
    """The block-sparse kernel equals a mask in logits and gradients, also with grouped heads."""
    shape = {"hidden_size": 448, "num_attention_heads": 28, "num_key_value_heads": 4, "qkv_bias": True}
    model = random_model(**shape, max_position_embeddings=600).cuda().to(dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for length in (40, 130, 257, 512):
        ids = torch.randint(3, 50, (2, length), device="cuda")
        prompts = torch.tensor([7, 19], device="cuda")
        levels = block_levels(torch.arange(length, device="cuda"), prompts, 16)
        square = levels[:, None, :] <= levels[:, :, None]
        results = []
        for whom in ({"levels": levels}, {"attention_mask": square}):
            model.zero_grad()
            logits = model(ids, **whom)
            logits.float().square().mean().backward()
            results.append((logits, model.layers[0].attention.q_proj.weight.grad.clone()))
        tolerance = 1e-3 if dtype == torch.float32 else 5e-2
        for skipping, masked in zip(*results, strict=True):
            assert torch.allclose(skipping.float(), masked.float(), atol=tolerance, rtol=tolerance)


def test_levels_of_another_shape_or_beside_a_mask_are_refused():
    ids = torch.zeros(2, 12).long()
    with pytest.raises(ValueError, match=r"levels has shape \(2, 11\); give \(B, M\) = \(2, 12\)"):
        MODEL(ids, levels=torch.zeros(2, 11).long())
    with pytest.raises(ValueError, match="attention_mask and levels: give one of them"):
        MODEL(ids, torch.ones(2, 12).bool(), levels=ids)


def test_block_levels_by_hand():
    """Prompts of 3 and 5 in a canvas of 12, blocks of 4; the remainder is a block by itself."""
    levels = block_levels(torch.arange(12), torch.tensor([3, 5]), 4)
    assert levels.tolist() == [[0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3], [0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]]
    some = torch.tensor([[2, 3], [11, 0]])
    assert block_levels(some, torch.tensor([3, 5]), 4).tolist() == [[0, 1], [2, 0]]


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
