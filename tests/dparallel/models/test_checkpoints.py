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
    names = save_model(llada_tiny, tmp_path, build_tokenizer())
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
        ({"mask_token_id": None}, "mask_token_id=None"),
        ({"num_hidden_layers": 3}, r"another architecture: missing \['layers.2"),
        ({"num_hidden_layers": 1}, r"surplus \['layers.1"),
        ({"intermediate_size": 65}, r"layers\.0\.feed_forward\.\w+\.weight has shape"),
    ],
)
def test_foreign_checkpoints_are_refused(tiny_checkpoint, tmp_path, fields, message):
    with pytest.raises(CheckpointError, match=message):
        load_model(edited(tiny_checkpoint, tmp_path, **fields))


def test_unknown_llada_variants_are_refused(tmp_path):
    folder = shutil.copytree(GOLDEN / "llada_tiny", tmp_path / "llada")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "activation_type": "swiglu"}))
    with pytest.raises(CheckpointError, match="activation_type='swiglu'; only 'silu'"):
        load_model(folder)


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
