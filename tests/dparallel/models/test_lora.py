from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from dparallel.config.experiment import LoraSettings
from dparallel.models.adapters import load_adapter
from dparallel.models.backbone import DiffusionTransformer
from dparallel.models.lora import AdapterError, attach, merge
from tests.conftest import random_model
from tests.dparallel.models.published import edit_json

CANVAS = torch.tensor([[5, 6, 1, 1, 1], [7, 1, 9, 1, 1]])


def trained_adapter(model: DiffusionTransformer) -> PeftModel:
    """An adapter whose B matrices are not zero."""
    student = attach(model, LoraSettings(rank=4, alpha=8)).eval()
    torch.manual_seed(1)
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.2)
    return student


def test_all_seven_matrices_of_every_layer_and_nothing_else_train() -> None:
    model = random_model()
    before = model(CANVAS)
    student = attach(model, LoraSettings(rank=4, alpha=8))
    trainable = [name for name, weight in student.named_parameters() if weight.requires_grad]
    assert len(trainable) == 2 * 7 * 2  # layers x matrices x (A, B)
    assert all("lora_" in name for name in trainable)
    assert torch.equal(student(CANVAS), before)  # starts as the identity


@pytest.mark.parametrize(
    ("target", "matched"),
    [("ff_out", 0), ("lm_head", 0), ("layers.1.attention.q_proj", 0), ("proj", 0), ("attention_norm", 0)],
)
def test_a_target_that_does_not_match_is_named(target: str, matched: int) -> None:
    with pytest.raises(
        AdapterError, match=f"'{target}' matches in {matched} of 2 layers; known modules"
    ) as error:
        attach(random_model(), LoraSettings(targets=("q_proj", target)))
    for known in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert known in str(error.value)


def test_a_target_in_some_layers_only_is_an_error() -> None:
    model = random_model()
    model.get_submodule("layers.1.feed_forward").up_proj = nn.Identity()
    with pytest.raises(AdapterError, match="'up_proj' matches in 1 of 2 layers"):
        attach(model, LoraSettings())


def saved_adapter(folder: Path) -> dict[str, torch.Tensor]:
    trained_adapter(random_model()).save_pretrained(str(folder))
    return load_file(folder / "adapter_model.safetensors")


def test_an_adapter_of_which_a_matrix_is_missing_or_too_much_is_refused(tmp_path: Path) -> None:
    tensors, file = saved_adapter(tmp_path), tmp_path / "adapter_model.safetensors"
    names = sorted(tensors)
    load_adapter(random_model(), tmp_path)

    def refused(message: str) -> None:
        model = random_model()
        with pytest.raises(AdapterError, match=message):
            load_adapter(model, tmp_path)
        assert not any("lora" in name for name, _ in model.named_modules()), "the model is as it was"

    for lost in (names[:1], names[3:5], [name for name in names if ".layers.1." in name]):
        save_file({name: tensors[name] for name in names if name not in lost}, file)
        refused(rf"is not what its adapter_config\.json describes: missing \['{lost[0]}'.*, surplus nothing")
    edit_json(tmp_path / "adapter_config.json", target_modules=["q_proj"])
    save_file(tensors, file)
    refused(r"missing nothing, surplus \[.*layers\.0\.attention\.k_proj.lora_A")
    edit_json(tmp_path / "adapter_config.json", target_modules=["no_such"])
    refused(r"adapter_config\.json fits no model of this shape")


def test_an_adapter_of_another_rank_or_cut_short_is_refused(tmp_path: Path) -> None:
    saved_adapter(tmp_path)
    edit_json(tmp_path / "adapter_config.json", r=8)
    with pytest.raises(AdapterError, match=r"has shape \(4, \d+\), by its .* should have \(8, \d+\)"):
        load_adapter(random_model(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = saved_adapter(tmp_path)
    first = min(tensors)
    save_file({**tensors, first: tensors[first] * float("nan")}, file)
    with pytest.raises(AdapterError, match=f"{first} is not finite: the training diverged; train again"):
        load_adapter(random_model(), tmp_path)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is damaged or cut short"):
        load_adapter(random_model(), tmp_path)


@pytest.mark.parametrize(
    "change", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}, {"init_lora_weights": "pissa"}]
)
def test_whole_adapters_of_other_settings_load(tmp_path: Path, change: dict[str, Any]) -> None:
    model = random_model()
    student = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], **change))
    student.save_pretrained(str(tmp_path))
    load_adapter(random_model(), tmp_path)


def test_merge_equals_base_plus_adapter() -> None:
    student = trained_adapter(random_model())
    with torch.no_grad():
        expected = student(CANVAS)
        with student.disable_adapter():
            assert (student(CANVAS) - expected).abs().max() > 0.1  # the adapter does something
        merged = merge(student)
        torch.testing.assert_close(merged(CANVAS), expected, atol=1e-5, rtol=1e-5)
    assert list(merged.state_dict()) == list(random_model().state_dict())


def test_an_adapter_that_is_not_finite_is_refused() -> None:
    student = trained_adapter(random_model())
    with torch.no_grad():
        next(weight for name, weight in student.named_parameters() if "lora_A" in name)[0, 0] = torch.inf
    with pytest.raises(AdapterError, match=r"q_proj\.lora_A.* is not finite"):
        merge(student)


def test_save_and_load(tmp_path: Path) -> None:
    student = trained_adapter(random_model())
    student.save_pretrained(str(tmp_path))
    with torch.no_grad():
        loaded = load_adapter(random_model(), tmp_path)
        assert torch.equal(loaded(CANVAS), student(CANVAS))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"hidden_size": 48}, "trained on a model of another shape"),
        ({"num_hidden_layers": 1}, r"adapts layers\.1\..*, which this model does not have"),
    ],
)
def test_an_adapter_of_another_model_is_refused(shape: dict, message: str, tmp_path: Path) -> None:
    trained_adapter(random_model()).save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match=message):
        load_adapter(random_model(**shape), tmp_path)


def test_no_adapter_there(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such file; training writes it"):
        load_adapter(random_model(), tmp_path)
