"""Checkpoints whose tensors have several dtypes, or dtypes that cannot be used for computation."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dparallel import DecodingConfig, generate, load_model, save_model
from dparallel.config.experiment import MergingConfig
from dparallel.distillation.merging import run_stage
from dparallel.models.checkpoints import read_config
from dparallel.models.formats import CheckpointError
from tests.dparallel.distillation.conftest import record, trajectory_rows
from tests.dparallel.distillation.test_merging import write_training
from tests.dparallel.models.published import INDEX, publish

SHIFT = 1e-5  # lost where a norm is rounded to bf16


def is_norm(name: str) -> bool:
    return "norm" in name or "ln_f" in name


def change(folder: Path, convert) -> Path:
    """Convert the stored tensors (name, tensor) -> tensor in place."""
    for file in folder.glob("*.safetensors"):
        tensors = {name: convert(name, tensor) for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def wide_norms(folder: Path, family: str, shift: float = 0.0) -> Path:
    """The published checkpoint in bf16 except its norms, which are float32."""
    return change(
        publish(folder, family),
        lambda name, tensor: tensor.float() + shift if is_norm(name) else tensor,
    )


def held(folder: Path) -> dict[str, Tensor]:
    return {name: each for file in folder.glob("*.safetensors") for name, each in load_file(file).items()}


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_wide_norms_compute_what_narrow_ones_of_the_same_values_do(family: str, tmp_path: Path) -> None:
    plain = load_model(publish(tmp_path / "plain", family), "cpu")
    mixed = load_model(wide_norms(tmp_path / "mixed", family), "cpu")
    assert {name.endswith("norm.weight"): each.dtype for name, each in mixed.named_parameters()} == {
        True: torch.float32,
        False: torch.bfloat16,
    }
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(mixed(ids), plain(ids))
    decoding = DecodingConfig(gen_length=8, block_length=8, rule="entropy", threshold=0.5, stop_at_eos=False)
    assert generate(mixed, [[1, 2, 3]], decoding) == generate(plain, [[1, 2, 3]], decoding)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_every_tensor_keeps_its_dtype_and_bytes(family: str, tmp_path: Path) -> None:
    source, copy = wide_norms(tmp_path / "source", family, SHIFT), tmp_path / "copy"
    save_model(load_model(source, "cpu"), copy, format="original")
    before, after = held(source), held(copy)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert (copy / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_a_stated_dtype_that_is_not_the_stored_one_survives(tmp_path: Path) -> None:
    """config.json says bfloat16, the dtype for loading, although tensors are stored in float32."""
    source, copy = publish(tmp_path / "source", "llada", torch.float32), tmp_path / "copy"
    save_model(load_model(source, "cpu"), copy, format="original")
    for name in ("config.json", INDEX):
        assert (copy / name).read_bytes() == (source / name).read_bytes()


def test_a_merged_model_keeps_the_dtypes_of_its_teacher(tiny_checkpoint: Path, tmp_path: Path) -> None:
    teacher = wide_norms(tmp_path / "teacher", "llada", SHIFT)
    training = write_training(tmp_path / "training", teacher, load_model(teacher, "cpu", torch.float32))
    trajectories = record(tmp_path / "trajectories", tiny_checkpoint, trajectory_rows(2))
    inputs = {"teacher": str(teacher), "trajectories": str(trajectories), "training": str(training)}
    manifest = run_stage(MergingConfig(check_prompts=2), inputs, tmp_path / "out")
    assert manifest.metrics["max_logit_difference"] < 1e-4
    before, after = held(teacher), held(tmp_path / "out")
    assert {name: each.dtype for name, each in after.items()} == {
        name: each.dtype for name, each in before.items()
    }
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 2 * 7  # layers x matrices: those with an adapter
    assert not any(map(is_norm, changed))


def test_matrices_of_two_dtypes_are_named_unless_one_is_chosen(tmp_path: Path) -> None:
    source = change(
        publish(tmp_path / "source", "dream"), lambda name, each: each.half() if "embed" in name else each
    )
    message = r"stores .* as (BF16|F16), .* stores .* as (BF16|F16): say which dtype to load all in"
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(source, "cpu")
    assert "model.embed_tokens.weight as F16" in str(error.value)
    model = load_model(source, "cpu", torch.float32)
    assert {each.dtype for each in model.parameters()} == {torch.float32}
    assert read_config(source).vocab_size == 256


@pytest.mark.parametrize(
    ("dtype", "named"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8"), (torch.uint8, "U8")]
)
@pytest.mark.parametrize("read", [load_model, read_config])
def test_quantized_tensors_are_refused_by_name(dtype: torch.dtype, named: str, read, tmp_path: Path) -> None:
    down = "model.transformer.blocks.1.ff_out.weight"
    folder = change(
        publish(tmp_path / "source", "llada"), lambda name, each: each.to(dtype) if name == down else each
    )
    message = rf"tensor {down} is stored as {named}; only BF16, F16, F32, F64 are supported: .* not quantized"
    with pytest.raises(CheckpointError, match=message):
        read(folder)
