"""Bytes predicted from shapes compared with real modules and with what autograd stores."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from benchmarks.common.hardware import activation_bytes as measured_bytes
from dparallel.config.base import ConfigError
from dparallel.config.experiment import LoraSettings, TrainingConfig
from dparallel.config.recipe import RecipeConfig
from dparallel.distillation.quantization import quantize
from dparallel.distillation.recipe import loss, make_batch, make_views, teacher_logits
from dparallel.models.backbone import DiffusionConfig
from dparallel.models.lora import attach
from dparallel.models.placement import empty_model
from dparallel.preflight.training_memory import (
    Pass,
    adapter_count,
    base_bytes,
    kept_bytes,
    training_memory,
    weight_count,
)
from tests.conftest import random_model
from tests.dparallel.distillation.conftest import RECIPE, training_config

GROUPED = {"num_key_value_heads": 2, "qkv_bias": True}
SOME_TARGETS = LoraSettings(rank=8, targets=("q_proj", "v_proj"))
# D 4, two heads of 2, one key/value head (E 2), feed-forward 3, two layers, vocabulary 5.
BY_HAND = DiffusionConfig(
    vocab_size=5,
    hidden_size=4,
    intermediate_size=3,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    mask_token_id=4,
)


def step(model, training: TrainingConfig, dtype: torch.dtype, recipe: RecipeConfig = RECIPE):
    """A student and the loss of one batch of four views."""
    model = model.to(dtype)
    student = attach(model, training.lora).to(dtype).train()
    if training.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    rng = np.random.default_rng(0)
    responses = rng.integers(3, model.config.vocab_size, (2, 36))
    views = [make_views(recipe, each, np.zeros(36), 2, rng) for each in responses]
    batch = make_batch([np.arange(3, 15)] * 2, responses, views, model.config.mask_token_id)

    def value() -> torch.Tensor:
        teacher = teacher_logits(student, batch) if recipe.targets == "teacher" else None
        return loss(student(**batch.student_inputs), batch, recipe, teacher).loss

    return student, batch, value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["all", "checkpointing"])
@pytest.mark.parametrize("lora", [LoraSettings(rank=8), SOME_TARGETS], ids=["seven", "two"])
@pytest.mark.parametrize("shape", [{}, GROUPED, {"vocab_size": 4096}], ids=["plain", "grouped", "wide"])
def test_kept_bytes_are_those_that_autograd_keeps(shape, lora, checkpointing, dtype) -> None:
    model = random_model(hidden_size=64, intermediate_size=160, num_hidden_layers=4, **shape)
    training = training_config(lora=lora, gradient_checkpointing=checkpointing)
    shapes = Pass(4, 48, 2 * 12)
    predicted = kept_bytes(empty_model(model.config), training, shapes, dtype)
    student, _, value = step(model, training, dtype)
    assert predicted == pytest.approx(measured_bytes(value, student), rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["all", "checkpointing"])
def test_the_teachers_logits_are_kept_as_targets(checkpointing, dtype) -> None:
    """With a vocabulary so large that its activations dominate."""
    model = random_model(hidden_size=64, intermediate_size=160, num_hidden_layers=4, vocab_size=4096)
    training = training_config(gradient_checkpointing=checkpointing)
    shapes = Pass(4, 48, 2 * 12, soft=True)
    predicted = kept_bytes(empty_model(model.config), training, shapes, dtype)
    hard = kept_bytes(empty_model(model.config), training, dataclasses.replace(shapes, soft=False), dtype)
    assert predicted - hard == dtype.itemsize * 24 * 4096
    soft_recipe = RECIPE.model_copy(update={"targets": "teacher"})
    student, _, value = step(model, training, dtype, soft_recipe)
    assert predicted == pytest.approx(measured_bytes(value, student), rel=0.15)


def test_checkpointing_keeps_little_and_changes_no_gradient() -> None:
    """Through an adapter on a frozen base, whose input needs no gradient."""
    kept, gradients = {}, {}
    for checkpointing in (False, True):
        model = random_model(num_hidden_layers=4)
        torch.manual_seed(1)
        training = training_config(gradient_checkpointing=checkpointing)
        student, _, value = step(model, training, torch.float32)
        torch.manual_seed(2)
        for name, weight in student.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        kept[checkpointing] = measured_bytes(value, student)
        value().backward()
        gradients[checkpointing] = {
            name: weight.grad for name, weight in student.named_parameters() if weight.requires_grad
        }
    assert kept[True] < 0.2 * kept[False]
    for name, gradient in gradients[False].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[True][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lora", [LoraSettings(rank=8), SOME_TARGETS], ids=["seven", "two"])
@pytest.mark.parametrize("shape", [{}, GROUPED, {"tie_word_embeddings": True}])
def test_weights_are_counted_exactly(shape, lora) -> None:
    model = random_model(**shape)
    empty = empty_model(model.config)
    held = sum(each.nbytes for each in model.parameters())
    assert weight_count(empty) * 4 == base_bytes(empty, None, torch.float32) == held
    student = attach(model, lora)
    assert adapter_count(empty, lora) == sum(w.numel() for w in student.parameters() if w.requires_grad)


def test_four_bit_weights_are_counted_exactly_and_compute_what_they_hold() -> None:
    """Compared with a model of the original weights."""
    four_bits = pytest.importorskip("bitsandbytes").functional
    model = random_model(hidden_size=64, intermediate_size=192, qkv_bias=True)
    rounded = copy.deepcopy(model)
    predicted = base_bytes(empty_model(model.config), "nf4", torch.float32)
    quantize(model, torch.device("cpu"))
    held = {name: each for name, each in model.named_parameters() if hasattr(each, "quant_state")}
    assert len(held) == 14
    states = [each.quant_state for each in held.values()]
    tensors = [each for state in states for each in (state.absmax, state.code, state.offset)]
    tensors += [each for state in states for each in (state.state2.absmax, state.state2.code)]
    assert predicted == sum(each.nbytes for each in [*model.parameters(), *tensors])

    for name, weight in held.items():
        plain = rounded.get_parameter(name)
        stands_for = four_bits.dequantize_4bit(weight.data, weight.quant_state)
        assert (stands_for - plain).std() < 0.15 * plain.std()
        plain.data = stands_for
    canvas = torch.tensor([[3, 1, 1, 4]])
    torch.testing.assert_close(model(canvas), rounded(canvas), rtol=1e-3, atol=1e-3)

    student, _, value = step(model, training_config(gradient_checkpointing=True), torch.float32)
    value().backward()
    assert all(w.grad.isfinite().all() for w in student.parameters() if w.requires_grad)


def test_matrices_that_four_bits_cannot_hold_are_refused() -> None:
    model = random_model(hidden_size=48)
    with pytest.raises(ConfigError, match=r"attention\.q_proj has 48 inputs, no multiple of 64"):
        quantize(model, torch.device("cpu"))


def memory(processes: int = 1, dtype: torch.dtype = torch.bfloat16, **zero):
    """By hand for the model with a rank-2 adapter on q (4 + 4) and v (4 + 2) of two layers: 56 weights."""
    training = training_config(
        lora=LoraSettings(rank=2, targets=("q_proj", "v_proj")),
        deepspeed={"zero_optimization": {"stage": 2, "reduce_bucket_size": 100, **zero}},
    )
    return training_memory(empty_model(BY_HAND), training, Pass(2, 3, 4), processes, dtype)


def test_memory_by_hand() -> None:
    """A layer's matrices 84 (as 2·4·4 + 2·4·2 + 3·4·3), its norms 8; embedding and head 20, the norm 4."""
    base, adapter = 2 * (84 + 8) + 20 + 20 + 4, 56
    alone = memory()
    assert alone.weights == 2 * (base + adapter)
    assert alone.optimizer == 3 * 4 * adapter
    assert alone.gradients == 2 * adapter + 2 * adapter
    assert alone.buffer == alone.kinds()["gradient buffer"] == 2 * 100
    assert alone.update == 4 * adapter
    assert alone.peak == sum(alone.kinds().values()) - alone.update
    wide = memory(dtype=torch.float32)
    assert (wide.weights, wide.optimizer) == (2 * alone.weights, alone.optimizer)

    shared = memory(processes=4)
    assert (shared.weights, shared.optimizer) == (alone.weights, alone.optimizer / 4)
    assert shared.gradients == 2 * adapter + 2 * adapter / 4
    offloaded = memory(offload_optimizer={"device": "cpu"})
    assert (offloaded.optimizer, offloaded.update) == (0, 0)
    assert (offloaded.gradients, offloaded.buffer) == (2 * adapter, 2 * 100)

    parted = memory(processes=4, stage=3, stage3_max_live_parameters=50)
    assert parted.weights == 2 * 50 + 2 * (base + adapter) / 4
    assert parted.gradients == 2 * adapter / 4 + 2 * adapter / 4
    assert memory(4, stage=3, stage3_max_live_parameters=50, offload_param={"device": "cpu"}).weights == 100


def test_the_peak_is_backward_or_update() -> None:
    made = memory()
    assert dataclasses.replace(made, activations=5, update=7).peak == (
        made.weights + made.optimizer + made.gradients + made.buffer + 7
    )


def test_llada_8b_trains_on_24_gib() -> None:
    """Rank 128 on all seven matrices, both views of a sample of 384 tokens."""
    from benchmarks.common.shapes import SHAPES

    model, shapes = empty_model(SHAPES["llada-8b"].config), Pass(2, 384, 32)
    training = training_config(lora=LoraSettings(rank=128, alpha=128), gradient_checkpointing=True)
    wide = training_memory(model, training, shapes, 1, torch.bfloat16)
    assert adapter_count(model, training.lora) == 335_544_320
    assert 21.5 < wide.peak / 2**30 < 22.5
    narrow = training_memory(
        model, training.model_copy(update={"quantization": "nf4"}), shapes, 1, torch.bfloat16
    )
    assert 11.5 < narrow.peak / 2**30 < 12.5
