"""Discrete diffusion forcing compared with the published trainer, using its adapter and our loss."""

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from dparallel.config.experiment import LoraSettings
from dparallel.distillation.recipe import Batch, loss, make_batch, make_views, teacher_logits
from dparallel.models.attention import block_levels
from dparallel.models.checkpoints import load_model
from dparallel.models.lora import attach
from tests.conftest import GOLDEN
from tests.dparallel.distillation.conftest import shipped

D2F = shipped("d2f").model_copy(update={"block_length": 6})
OUR_NAMES = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "attn_out": "o_proj"}
PUBLISHED_LORA = LoraSettings(rank=4, alpha=4, targets=tuple(OUR_NAMES.values()))


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "d2f_loss.safetensors")


@pytest.fixture(scope="module")
def student(golden: dict[str, torch.Tensor]) -> PeftModel:
    """The published adapter on our model, under PEFT's own names."""
    made = attach(load_model(GOLDEN / "llada_tiny", device="cpu"), PUBLISHED_LORA)
    adapter = {}
    for name, weight in golden.items():
        if name.startswith("lora."):
            for theirs, ours in OUR_NAMES.items():
                name = name.replace(f".{theirs}.", f".attention.{ours}.")
            adapter[name.removeprefix("lora.").replace("model.transformer.blocks", "layers")] = weight
    loaded = made.load_state_dict(adapter, strict=False)
    assert not loaded.unexpected_keys
    assert not any("lora_" in name for name in loaded.missing_keys)
    return made.eval()


def golden_batch(golden: dict[str, torch.Tensor], index: int) -> Batch:
    tokens, noisy, masked, ratio = (
        golden[f"{index}.{name}"] for name in ("input_ids", "noisy", "masked", "mask_prob")
    )
    read = masked.bool()
    levels = block_levels(torch.arange(noisy.shape[1]), golden[f"{index}.prompt_lengths"].long(), 8)
    weight = 1 / ratio[read] / read.sum()
    return Batch(noisy, None, read, tokens[read], read.nonzero()[:, 0], weight, levels)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_golden(golden: dict[str, torch.Tensor], student: PeftModel, index: int) -> None:
    batch = golden_batch(golden, index)
    assert torch.equal(batch.levels[:, None, :] <= batch.levels[:, :, None], golden[f"{index}.attend"].bool())
    with torch.no_grad():
        logits = student(**batch.student_inputs)
        expected = golden[f"{index}.student_logits"][batch.read]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        made = loss(logits, batch, D2F, teacher_logits(student, batch))
    assert made.loss.item() == pytest.approx(golden[f"{index}.loss"].item(), abs=1e-4)
    # The loss with the tokens as targets, or with the student as its own teacher
    for other in (
        loss(logits, batch, D2F.model_copy(update={"targets": "trajectory"})),
        loss(logits, batch, D2F, logits),
    ):
        assert abs(other.loss.item() - golden[f"{index}.loss"].item()) > 1e-2


def test_the_teacher_is_the_base_and_has_no_gradient(
    golden: dict[str, torch.Tensor], student: PeftModel
) -> None:
    batch = golden_batch(golden, 0)
    base = load_model(GOLDEN / "llada_tiny", device="cpu")
    made = teacher_logits(student, batch)
    assert not made.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(made, base(batch.canvas)[batch.read], rtol=0, atol=1e-5)
    loss(student(**batch.student_inputs), batch, D2F, made).loss.backward()
    trained = {name for name, weight in student.named_parameters() if weight.grad is not None}
    assert trained == {name for name, _ in student.named_parameters() if "lora_" in name}
    student.zero_grad(set_to_none=True)


def test_dream_whose_shift_is_invisible() -> None:
    """Its aligned logits follow the attention pattern, although the weights predict the next position."""
    student = attach(load_model(GOLDEN / "dream_tiny", device="cpu"), PUBLISHED_LORA)
    torch.manual_seed(0)
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    model, rng = student.get_base_model(), np.random.default_rng(0)
    assert model.config.predicts_next
    prompts, responses = [rng.integers(3, 250, 5), rng.integers(3, 250, 9)], rng.integers(3, 250, (2, 18))
    views = [make_views(D2F, each, np.arange(18), (254,), rng) for each in responses]
    batch = make_batch(prompts, responses, views, model.config.mask_token_id, 0.1, D2F.block_length)
    made = loss(student(**batch.student_inputs), batch, D2F, teacher_logits(student, batch))
    made.loss.backward()
    assert made.loss.item() > 0
    assert all(weight.grad.abs().max() > 0 for name, weight in student.named_parameters() if "lora_A" in name)
    with torch.no_grad():
        before = student(batch.canvas, levels=batch.levels)
        for level in (1, 2, 3):
            changed = torch.where(batch.levels >= level, 9, batch.canvas)
            after = student(changed, levels=batch.levels)
            torch.testing.assert_close(before[batch.levels < level], after[batch.levels < level])
            assert not torch.allclose(before[batch.levels == level], after[batch.levels == level])
