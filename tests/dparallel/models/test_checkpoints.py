import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dparallel import load_model, load_tokenizer, save_model
from dparallel.models import weights
from dparallel.models.checkpoints import read_config
from dparallel.models.formats import CheckpointError
from dparallel.tiny.tokenizer import build_tokenizer
from tests.conftest import GOLDEN, ROOT, random_model
from tests.dparallel.models.published import ABSENT, INDEX, edit_json, edited_llada, publish


def test_golden_logits(llada_tiny):
    golden = load_file(GOLDEN / "llada_logits.safetensors")
    with torch.no_grad():
        logits = llada_tiny(golden["input_ids"])
    assert torch.allclose(logits, golden["logits"], atol=1e-4, rtol=0)
    assert (llada_tiny.config.family, llada_tiny.config.mask_token_id) == ("llada", 255)


def test_golden_logits_of_dream():
    """Published weights predict the next token; our logits are aligned, and nothing precedes the first."""
    golden = load_file(GOLDEN / "dream_logits.safetensors")
    dream = load_model(GOLDEN / "dream_tiny", device="cpu")
    with torch.no_grad():
        logits = dream(golden["input_ids"])
    raw = golden["raw_logits"]
    assert torch.allclose(logits[:, 1:], raw[:, :-1], atol=1e-4, rtol=0)
    assert torch.allclose(logits[:, 0], raw[:, 0], atol=1e-4, rtol=0)
    config = dream.config
    assert (config.family, config.mask_token_id, config.pad_token_id) == ("dream", 255, 253)
    assert (config.eos_token_id, config.end_token_ids) == (None, ())  # this checkpoint has none


def test_special_tokens_may_stand_in_generation_config(tmp_path):
    folder = shutil.copytree(GOLDEN / "dream_tiny", tmp_path / "dream")
    stated = {"eos_token_id": 254, "pad_token_id": 1, "bos_token_id": [7], "temperature": 0.1}
    (folder / "generation_config.json").write_text(json.dumps(stated), encoding="utf-8")
    config = read_config(folder)
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == (254, 253, None)


def test_round_trip_in_our_own_format(tiny_model, tmp_path):
    names = save_model(tiny_model, tmp_path, tokenizer=build_tokenizer())
    assert names == sorted(file.name for file in tmp_path.iterdir())
    assert names == [
        "backbone.py",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    again = load_model(tmp_path, device="cpu")
    for name, tensor in tiny_model.state_dict().items():
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


@pytest.mark.slow
def test_loads_with_plain_transformers(tiny_checkpoint, tmp_path):
    """In a process that does not import this package."""
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
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    model = load_model(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"].bfloat16())
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors is missing"):
        load_model(tmp_path)


def test_any_dtype(tmp_path):
    stored = load_file(publish(tmp_path / "dream", "dream") / "model-00001-of-00003.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    for dtype, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        model = load_model(tmp_path / "dream", "cpu", dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
        assert torch.equal(model.lm_head.weight, stored["lm_head.weight"].to(dtype))


@pytest.mark.parametrize("read", [load_model, read_config])
def test_broken_shards_are_named_before_any_tensor_is_read(tmp_path, read, monkeypatch):
    def no_reading(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(weights, "read", no_reading)
    folder = publish(tmp_path / "llada", "llada")
    first, last = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"

    def refused(message):
        with pytest.raises(CheckpointError, match=message):
            read(folder)

    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    edit_json(folder / INDEX, weight_map={**index["weight_map"], "model.extra.weight": last})
    refused(r"index\.json says model\.extra\.weight is in model-00003-of-00003\.safetensors, which does not")
    edit_json(folder / INDEX, weight_map={"a": "model-00004-of-00003.safetensors"})
    refused(r"model-00004-of-00003\.safetensors is missing: the checkpoint is incomplete")
    for file in (3, None, "../x.safetensors"):
        edit_json(folder / INDEX, weight_map={"a": file})
        refused(r"index\.json says a is in .*, expected the name of a file beside it")
    edit_json(folder / INDEX, weight_map={})
    refused(r"index\.json has no weight_map")
    (folder / INDEX).write_text("{", encoding="utf-8")
    refused(r"index\.json is not valid JSON")
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")

    whole = load_file(folder / first)
    name = "model.transformer.blocks.0.attn_norm.weight"
    save_file({**whole, name: whole[name][:-1].contiguous()}, folder / first)
    refused(rf"tensor {name} has shape \(63,\), config\.json says \(64,\)")
    save_file(whole, folder / first)
    save_file({**whole, "model.transformer.extra.weight": torch.ones(8)}, folder / first)
    refused(r"00001-of-00003\.safetensors holds model\.transformer\.extra\.weight, .*: correct the index")
    save_file(whole, folder / first)
    content = (folder / last).read_bytes()
    (folder / last).write_bytes(content[:-100])
    refused(r"model-00003-of-00003\.safetensors is damaged or cut short")
    (folder / last).unlink()
    refused(r"model-00003-of-00003\.safetensors is missing")


def memory(field):
    """Bytes of this process: `VmRSS` now, `VmHWM` at its peak since `clear_refs` was written."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        if line.startswith(field)
    )
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured as Linux tells it")
def test_no_second_copy_of_the_weights(tmp_path):
    """With stored and with converted dtypes: peak memory while loading relative to the model's size."""
    shape = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 12, "vocab_size": 2000}
    with torch.device("meta"):
        model = random_model(**shape)
    tensors = {
        name: torch.ones(each.shape, dtype=torch.bfloat16) for name, each in model.state_dict().items()
    }
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size > 150e6
    model.config.save_pretrained(tmp_path)
    weight_map = {name: f"{i % 8}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    for dtype in (None, torch.float16):
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        loaded = load_model(tmp_path, "cpu", dtype)
        assert all(bool((weight == 1).all()) for weight in loaded.parameters())  # touches every page
        assert 0.9 < (memory("VmHWM") - before) / size < 1.3
        del loaded


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


@pytest.mark.parametrize(
    ("family", "ids", "mask"), [("llada", [3, 255, 0], None), ("dream", [86, 18, 255, 188, 189], 255)]
)
def test_published_tokenizers_load_without_their_code(tmp_path, family, ids, mask, caplog):
    """`w3` is one word to the one, two letters to the other, whose `hi` is one piece."""
    tokenizer = load_tokenizer(publish(tmp_path / family, family))
    assert tokenizer("w3<|mask|> hi").input_ids == ids
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id, len(tokenizer)) == (mask, 254, 256)
    assert not caplog.records


@pytest.mark.slow
def test_saving_prints_nothing(tmp_path: Path) -> None:
    """Nor does DeepSpeed, which transformers imports, say that it found no GPU."""
    script = f"""
import dparallel
model = dparallel.load_model({str(ROOT / "teachers" / "tiny")!r}, device="cpu")
dparallel.save_model(model, "saved")
"""
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")
