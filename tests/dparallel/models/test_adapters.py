"""Adapters under the publishers' module names, compared with what PEFT itself merges under these names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from dparallel import load_model, save_model
from dparallel.config.experiment import LoraSettings
from dparallel.models.adapters import load_adapter, write_adapter
from dparallel.models.lora import AdapterError, attach, merge
from dparallel.models.names import LLADA, LLAMA
from tests.conftest import GOLDEN, random_model
from tests.dparallel.models.published import edit_json

NAMES = {"llada": LLADA, "dream": LLAMA}
FORMAT = {"llada": "llada", "dream": "Dream"}
IDS = torch.arange(3, 40)[None]
# What the publishers' configs list: dParallel and d3LLM name seven matrices of which LLaDA has four.
TARGETS = {
    "seven of Llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "D2F, LLaDA": ["q_proj", "k_proj", "v_proj", "attn_out"],
    "with the head": ["ff_proj", "ff_out"],
    "a pattern": r"model\..*(blocks|layers)\.1\..*_proj",
}


class Tree(nn.Module):
    """The linear modules of a published checkpoint under the publisher's names, as PEFT finds them there."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        super().__init__()
        for name, tensor in tensors.items():
            module, _, parameter = name.rpartition(".")
            if parameter != "weight" or tensor.dim() != 2 or "embed" in name or "wte" in name:
                continue
            linear = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False)
            linear.weight.data = tensor.clone()
            holder: nn.Module = self
            *path, last = module.split(".")
            for part in path:
                if not hasattr(holder, part):
                    holder.add_module(part, nn.Module())
                holder = getattr(holder, part)
            holder.add_module(last, linear)


def adapted(family: str, folder: Path, **settings: Any) -> Path:
    """An adapter that PEFT trained on the publisher's modules, and beside it the model that PEFT merged."""
    tensors = load_file(GOLDEN / f"{family}_tiny" / "model.safetensors")
    student = get_peft_model(Tree(tensors), LoraConfig(lora_alpha=8, **settings))  # type: ignore[arg-type]
    torch.manual_seed(1)
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.2)
    student.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    merged = student.merge_and_unload()
    assert isinstance(merged, nn.Module)
    (folder / "merged").mkdir()
    save_file(
        {**tensors, **{name: tensor.contiguous() for name, tensor in merged.state_dict().items()}},
        folder / "merged" / "model.safetensors",
    )
    config = (GOLDEN / f"{family}_tiny" / "config.json").read_text(encoding="utf-8")
    (folder / "merged" / "config.json").write_text(config, encoding="utf-8")
    return folder


def difference(first: nn.Module, second: nn.Module) -> float:
    with torch.no_grad():
        return (first(IDS) - second(IDS)).abs().max().item()


CASES = [
    ("llada", {"target_modules": TARGETS["seven of Llama"]}),
    ("llada", {"target_modules": TARGETS["D2F, LLaDA"], "use_rslora": True}),
    ("llada", {"target_modules": TARGETS["with the head"], "rank_pattern": {"ff_proj": 2}}),
    ("llada", {"target_modules": TARGETS["a pattern"], "alpha_pattern": {"blocks.1.q_proj": 3}}),
    ("dream", {"target_modules": TARGETS["seven of Llama"], "exclude_modules": ["k_proj"]}),
    ("dream", {"target_modules": ["self_attn.q_proj", "lm_head"], "layers_to_transform": [1]}),
    ("dream", {"target_modules": TARGETS["a pattern"]}),
]


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_a_published_adapter_equals_what_its_publisher_merges(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = adapted(family, tmp_path, **settings)
    base = GOLDEN / f"{family}_tiny"
    theirs = load_model(folder / "merged", "cpu")
    ours = load_model(base, "cpu", adapter=folder / "adapter")
    assert difference(ours, load_model(base, "cpu")) > 0.1  # the adapter does something
    assert difference(ours, theirs) < 1e-4
    save_model(ours, tmp_path / "saved", format="original")
    saved, published = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "merged"))
    assert saved.keys() == published.keys()
    # Written with our names, it is the same adapter; and with the publisher's names again.
    model = load_model(base, "cpu")
    write_adapter(folder / "adapter", model.config, "dparallel", tmp_path / "native")
    write_adapter(tmp_path / "native", model.config, FORMAT[family], tmp_path / "again")
    for name in ("native", "again"):
        assert difference(load_model(base, "cpu", adapter=tmp_path / name), theirs) < 1e-4
    before, after = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_ours_loads_on_the_publishers_modules(family: str, tmp_path: Path) -> None:
    base = GOLDEN / f"{family}_tiny"
    model = load_model(base, "cpu")
    student = attach(model, LoraSettings(rank=4, alpha=8))
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.2)
    student.save_pretrained(str(tmp_path / "ours"))
    files = write_adapter(tmp_path / "ours", model.config, FORMAT[family], tmp_path / "theirs")
    assert files == sorted(file.name for file in (tmp_path / "theirs").iterdir())
    settings = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text(encoding="utf-8"))
    short = {name for name in settings["target_modules"] if "." not in name}
    assert {"q_proj", "k_proj", "v_proj", "up_proj"} < short
    assert "ff_out" not in short  # LLaDA's head has this name, too

    tensors = load_file(base / "model.safetensors")
    merged = PeftModel.from_pretrained(Tree(tensors), str(tmp_path / "theirs")).merge_and_unload()
    ours = merge(student).state_dict()
    names = NAMES[family]
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(ours[names.native(name)], tensor, atol=1e-6, rtol=1e-6)


def test_adapters_that_hold_more_than_low_rank_matrices_are_refused_by_name(tmp_path: Path) -> None:
    folder = adapted("llada", tmp_path, target_modules=["q_proj"]) / "adapter"
    for field, value in [("use_dora", True), ("bias", "all"), ("modules_to_save", ["wte"])]:
        edit_json(folder / "adapter_config.json", **{field: value})
        with pytest.raises(AdapterError, match=f"{field}=.* merge it with the publisher's code"):
            load_adapter(load_model(GOLDEN / "llada_tiny", "cpu"), folder)
        edit_json(folder / "adapter_config.json", **{field: None if field == "modules_to_save" else False})
        edit_json(folder / "adapter_config.json", bias="none")
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "IA3", "target_modules": ["q_proj"]}', encoding="utf-8"
    )
    with pytest.raises(AdapterError, match=r"adapter_config\.json has peft_type=.*IA3.*; only LORA"):
        load_adapter(load_model(GOLDEN / "llada_tiny", "cpu"), folder)


def test_an_adapter_of_another_family_or_without_safetensors_is_refused(tmp_path: Path) -> None:
    folder = adapted("llada", tmp_path, target_modules=["attn_out"]) / "adapter"
    with pytest.raises(
        AdapterError, match=r"adapts model\.transformer\.blocks\.0\.attn_out, which this model"
    ):
        load_adapter(load_model(GOLDEN / "dream_tiny", "cpu"), folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin, which may run code and is not read"):
        load_adapter(load_model(GOLDEN / "llada_tiny", "cpu"), folder)


def test_an_adapter_of_a_head_that_is_the_embedding_is_refused(tmp_path: Path) -> None:
    model = random_model()
    config = LoraConfig(r=2, target_modules=["lm_head"])
    get_peft_model(model, config).save_pretrained(str(tmp_path), save_embedding_layers=False)
    load_adapter(random_model(), tmp_path)
    with pytest.raises(AdapterError, match="adapts the head, which this model shares with its embedding"):
        load_adapter(random_model(tie_word_embeddings=True), tmp_path)
