"""Exports for other programs: names and bytes of the publishers, plain transformers, Llama and Qwen2."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from dparallel import load_model, load_tokenizer
from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.generate import generate
from dparallel.models import export
from dparallel.models.backbone import DiffusionTransformer
from dparallel.models.export import export_model, generates, original_type, patterns
from dparallel.models.formats import CheckpointError, read_fields
from dparallel.models.names import LLADA
from dparallel.models.placement import empty_model
from dparallel.tiny.tokenizer import build_tokenizer
from tests.conftest import GOLDEN, random_model
from tests.dparallel.models.test_formats import LLADA_8B
from tests.dparallel.rules.fitted import random_commit_rule

IDS = torch.arange(3, 40)[None]
PROMPTS = torch.tensor([[5, 7, 9, 11], [6, 3, 8, 4]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found = model(IDS)
    return found if isinstance(found, torch.Tensor) else found.logits


def native(family: str) -> DiffusionTransformer:
    """A model in our own format that has LLaDA's or Dream's layers."""
    if family == "llada":
        return random_model()
    model = random_model(num_key_value_heads=2, qkv_bias=True, predicts_next=True)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.3)
    return model


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("source", ["published", "native"])
def test_original_has_the_publishers_names_and_loads_with_plain_transformers(
    family: str, source: str, tmp_path: Path
) -> None:
    model = load_model(GOLDEN / f"{family}_tiny", "cpu") if source == "published" else native(family)
    if model.config.eos_token_id is None:  # as in Dream's golden checkpoint
        model.config.eos_token_id, model.config.end_token_ids = 2, (2,)
    decoding = DecodingConfig(gen_length=12, block_length=4, rule="entropy", threshold=1.5)
    files = export_model(model, build_tokenizer(), tmp_path, "original", decoding)
    assert {"config.json", "model.safetensors", "backbone.py", "modeling_dparallel.py"} <= set(files)
    if source == "published":  # the same names, shapes and bytes
        written, golden = (
            load_file(folder / "model.safetensors") for folder in (tmp_path, GOLDEN / f"{family}_tiny")
        )
        assert written.keys() == golden.keys()
        assert all(torch.equal(written[name], golden[name]) for name in golden)
    ours = load_model(tmp_path, "cpu")
    assert ours.config.family == family
    if source == "native":  # the tokenizer's mask token is that of the model
        assert load_tokenizer(tmp_path)("Tom 7").input_ids == build_tokenizer()("Tom 7").input_ids
    assert torch.equal(logits(ours), logits(model))

    theirs = AutoModel.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert type(theirs).__module__.startswith("transformers_modules")
    assert torch.equal(logits(theirs), logits(model))
    assert "from dparallel" not in (tmp_path / "modeling_dparallel.py").read_text(encoding="utf-8")
    for settings in ({}, {"rule": "confidence", "threshold": 0.3}, {"rule": "steps", "steps": 6}):
        tokens, nfe = theirs.generate(PROMPTS, **settings)
        shape = {"gen_length": 12, "block_length": 4, "rule": "entropy", "threshold": 1.5}
        fields = {**shape, **settings}
        if fields["rule"] == "steps":
            del fields["threshold"]
        expected = generate(model, PROMPTS.tolist(), DecodingConfig(**fields))
        assert tokens[:, PROMPTS.shape[1] :].tolist() == [row.tokens for row in expected]
        assert nfe == [row.nfe for row in expected]
    with pytest.raises(ValueError, match="cfg_scale: unknown setting; known: gen_length, block_length"):
        theirs.generate(PROMPTS, cfg_scale=1.0)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_llama_is_a_llama_or_a_qwen2_that_attends_in_both_directions(family: str, tmp_path: Path) -> None:
    model = load_model(GOLDEN / f"{family}_tiny", "cpu")
    export_model(model, build_tokenizer(), tmp_path, "llama")
    raw = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert raw["architectures"] == [{"llada": "LlamaForCausalLM", "dream": "Qwen2ForCausalLM"}[family]]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        found = theirs(IDS, attention_mask=torch.zeros(1, 1, IDS.shape[1], IDS.shape[1])).logits
    if raw["dllm"]["logits"] == "of the next position":
        found = torch.cat([found[:, :1], found[:, :-1]], dim=1)
    torch.testing.assert_close(found, logits(model), atol=5e-5, rtol=1e-4)


def test_large_models_are_written_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "SHARD_BYTES", 20_000)
    model = load_model(GOLDEN / "llada_tiny", "cpu")
    files = export_model(model, build_tokenizer(), tmp_path, "original")
    assert "model.safetensors.index.json" in files
    assert sum(name.endswith(".safetensors") for name in files) > 2
    assert torch.equal(logits(load_model(tmp_path, "cpu")), logits(model))


def test_layers_that_no_publisher_has_are_refused_with_the_reason(tmp_path: Path) -> None:
    wide = random_model(head_dim=16)
    with pytest.raises(CheckpointError, match="no publisher's format has this model: llada has head"):
        original_type(wide.config)
    normed = random_model(qk_norm=True)
    with pytest.raises(CheckpointError, match="neither Llama nor Qwen2 has norms of queries and keys"):
        export_model(normed, build_tokenizer(), tmp_path, "llama")
    assert original_type(native("dream").config) == "Dream"


@pytest.mark.parametrize("pattern", ["block_causal", "causal"])
def test_the_model_code_decodes_no_model_that_only_looks_back(pattern: str, tmp_path: Path) -> None:
    export_model(random_model(attention_pattern=pattern), build_tokenizer(), tmp_path, "original")
    theirs = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    with pytest.raises(ValueError, match=f"attention_pattern='{pattern}' .* models of full attention"):
        theirs.generate(PROMPTS)


@pytest.mark.parametrize(
    ("settings", "alike"),
    [
        ({"rule": "confidence", "threshold": 0.5}, True),
        ({"rule": "margin", "threshold": 0.5}, False),
        ({"mode": "multi_block"}, False),
        ({"cache": "prefix"}, False),
        ({"temperature": 1.0}, False),
        ({"suppress_eos": True}, False),
    ],
)
def test_what_the_model_code_decodes_as_ours_does(settings: dict[str, Any], alike: bool) -> None:
    decoding = DecodingConfig(**settings)
    assert generates(random_model().config, decoding) is alike
    assert not generates(random_model(attention_pattern="causal").config, decoding)


def test_the_fitted_commit_rule_goes_with_its_model(tmp_path: Path) -> None:
    model = random_model()
    model.commit_rule = random_commit_rule(5)
    files = export_model(model, build_tokenizer(), tmp_path, "original")
    assert "commit_rule.json" in files
    written = load_model(tmp_path, "cpu").commit_rule
    assert written is not None
    assert written.as_json() == model.commit_rule.as_json()


def test_patterns_rename_every_tensor() -> None:
    import re

    renamed = {}
    for name in random_model().state_dict():
        published = LLADA.published(name)
        [hit] = [
            re.sub(pattern, target, published)
            for pattern, target in patterns(LLADA).items()
            if re.search(pattern, published)
        ]
        renamed[name] = hit
    assert all(name == hit for name, hit in renamed.items())


def test_the_names_of_a_whole_llada_are_those_of_its_index() -> None:
    """291 tensors: embedding, final norm and head, and nine of each of 32 layers."""
    model = empty_model(read_fields(LLADA_8B, "config.json")[1])
    found = {LLADA.published(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    layer = ("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out")
    top = {"wte": (126464, 4096), "ln_f": (4096,), "ff_out": (126464, 4096)}
    assert found.items() >= {f"model.transformer.{name}.weight": shape for name, shape in top.items()}.items()
    blocks = {f"model.transformer.blocks.{n}.{name}.weight" for n in range(32) for name in layer}
    assert found.keys() == blocks | {f"model.transformer.{name}.weight" for name in top}
    assert found["model.transformer.blocks.31.ff_out.weight"] == (4096, 12288)
