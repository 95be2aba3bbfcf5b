import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from dparallel import load_model, load_tokenizer, save_model
from dparallel.models.checkpoints import CheckpointError
from dparallel.tiny.tokenizer import build_tokenizer
from tests.conftest import GOLDEN, random_model


def test_golden_logits(llada_tiny):
    golden = load_file(GOLDEN / "llada_logits.safetensors")
    with torch.no_grad():
        logits = llada_tiny(golden["input_ids"])
    assert torch.allclose(logits, golden["logits"], atol=1e-4, rtol=0)
    assert (llada_tiny.config.family, llada_tiny.config.mask_token_id) == ("llada", 255)


def test_round_trip_in_our_own_format(llada_tiny, tmp_path):
    names = save_model(llada_tiny, tmp_path, tokenizer=build_tokenizer())
    assert names == sorted(file.name for file in tmp_path.iterdir())
    assert names == [
        "backbone.py",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    again = load_model(tmp_path, device="cpu")
    for name, tensor in llada_tiny.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert load_tokenizer(tmp_path).mask_token_id == 1


def test_grouped_heads_bias_and_tied_embeddings_survive(tmp_path):
    model = random_model(num_key_value_heads=2, qkv_bias=True, tie_word_embeddings=True)
    save_model(model, tmp_path)
    again = load_model(tmp_path, device="cpu")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(again(ids), model(ids))
    assert again.lm_head.weight is again.embedding.weight


def test_loads_with_plain_transformers(tiny_checkpoint, tmp_path):
    """In a process that never imports this package."""
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.save(load_model(tiny_checkpoint, device="cpu")(ids), tmp_path / "logits.pt")
    script = f"""
import sys, torch
from transformers import AutoModel, AutoTokenizer
model = AutoModel.from_pretrained({str(tiny_checkpoint)!r}, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained({str(tiny_checkpoint)!r}, trust_remote_code=True)
assert tokenizer("Tom 7").input_ids == {build_tokenizer()("Tom 7").input_ids}
expected = torch.load({str(tmp_path / "logits.pt")!r})
assert torch.equal(model(torch.arange(3, 40)[None]), expected)
assert "dparallel" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env={"HF_HOME": str(tmp_path)})


def test_sharded_checkpoints_and_dtype(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, kept in shards.items():
        save_file({name: tensors[name] for name in kept}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, kept in shards.items() for name in kept}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    model = load_model(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"].bfloat16())
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors is missing"):
        load_model(tmp_path)


def edited(tiny_checkpoint, tmp_path, **fields):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "edited")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'; known: dparallel, llada"),
        ({"mask_token_id": 50}, r"mask_token_id=50, outside the vocabulary \(0 to 49\)"),
        ({"mask_token_id": None}, r"config\.json has mask_token_id=None, expected int"),
        ({"vocab_size": "50"}, r"config\.json has vocab_size='50', expected int"),
        ({"rope_theta": "1e4"}, r"config\.json has rope_theta='1e4', expected int or float"),
        ({"num_attention_heads": True}, "num_attention_heads=True, expected int"),
        ({"num_hidden_layers": 3}, r"another architecture: missing \['layers.2"),
        ({"num_hidden_layers": 1}, r"surplus \['layers.1"),
        ({"intermediate_size": 65}, r"layers\.0\.feed_forward\.\w+\.weight has shape"),
    ],
)
def test_foreign_checkpoints_are_refused(tiny_checkpoint, tmp_path, fields, message):
    with pytest.raises(CheckpointError, match=message):
        load_model(edited(tiny_checkpoint, tmp_path, **fields))


ABSENT = object()


def edited_llada(tmp_path, **fields):
    folder = shutil.copytree(GOLDEN / "llada_tiny", tmp_path / "llada")
    config = {**json.loads((folder / "config.json").read_text()), **fields}
    kept = {field: value for field, value in config.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("activation_type", "swiglu", "activation_type='swiglu'; only 'silu' is known for llada"),
        ("layer_norm_type", "default", "only 'rms'"),
        ("block_type", "sequential", "only 'llama'"),
        ("rope", False, "rope=False; only True"),
        ("alibi", True, "only False"),
        ("include_bias", True, "only False"),
        ("attention_layer_norm", True, "only False"),
        ("multi_query_attention", True, "only False"),
        ("input_emb_norm", True, "only False"),
        ("scale_logits", True, "only False"),
        ("clip_qkv", 8.0, "clip_qkv=8.0; only None"),
        ("d_model", ABSENT, "d_model=None, expected int"),
        ("eos_token_id", ABSENT, "eos_token_id=None, expected int"),
        ("mask_token_id", "255", "mask_token_id='255', expected int"),
        ("rope_theta", None, "rope_theta=None, expected int or float"),
        ("weight_tying", "yes", "weight_tying='yes', expected bool or NoneType"),
        ("weight_tying", True, "a head that differs: set weight_tying .* to false"),
    ],
)
def test_unknown_llada_variants_are_refused(tmp_path, field, value, message):
    folder = edited_llada(tmp_path, **{field: value})
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(folder, device="cpu")
    assert str(folder) in str(error.value)
    assert field in str(error.value)


@pytest.mark.parametrize("value", [ABSENT, None, False])
def test_llada_switches_that_are_off_are_accepted(llada_tiny, tmp_path, value):
    off = (
        "alibi",
        "attention_layer_norm",
        "multi_query_attention",
        "input_emb_norm",
        "scale_logits",
        "clip_qkv",
    )
    model = load_model(edited_llada(tmp_path, **dict.fromkeys((*off, "weight_tying"), value)), device="cpu")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids), llada_tiny(ids))


def test_a_tied_head_may_be_written_out(tmp_path):
    folder = edited_llada(tmp_path, weight_tying=True)
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["model.transformer.ff_out.weight"] = tensors["model.transformer.wte.weight"].clone()
    save_file(tensors, weights)
    model = load_model(folder, device="cpu")
    assert torch.equal(model.lm_head.weight, tensors["model.transformer.wte.weight"])


def test_formats_that_cannot_be_written(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="format='original' cannot be written; formats that can: native"):
        save_model(tiny_model, tmp_path / "out", format="original")
    assert not (tmp_path / "out").exists()
    assert "model.safetensors" in save_model(tiny_model, tmp_path / "out", format="native")


def test_missing_and_damaged_folders(tiny_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="neither a folder here .* nor a model on the hub"):
        load_model("nobody/nothing")
    with pytest.raises(CheckpointError, match="no config.json"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(GOLDEN / "llada_tiny")
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "cut")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or cut short"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_model(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"config\.json holds a list, expected an object"):
        load_model(folder)
