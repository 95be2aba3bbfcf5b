import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel

from dparallel import load_model, load_tokenizer, save_model
from dparallel.models import weights
from dparallel.models.checkpoints import read_config
from dparallel.models.formats import CheckpointError
from dparallel.tiny.tokenizer import build_tokenizer
from tests.conftest import GOLDEN, ROOT, random_model
from tests.dparallel.models.published import INDEX, edit_json, publish


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


def edited(tiny_checkpoint, tmp_path, **fields):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "edited")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **fields}), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'; known: dparallel, llada, Dream"),
        ({"mask_token_id": 50}, r"mask_token_id=50, outside the vocabulary \(0 to 49\)"),
        ({"eos_token_id": 50}, r"eos_token_id=50, outside the vocabulary \(0 to 49\)"),
        ({"pad_token_id": -1}, r"pad_token_id=-1, outside the vocabulary \(0 to 49\)"),
        ({"mask_token_id": None}, r"config\.json has mask_token_id=None, expected int"),
        ({"vocab_size": "50"}, r"config\.json has vocab_size='50', expected int"),
        ({"rope_theta": "1e4"}, r"config\.json has rope_theta='1e4', expected number"),
        ({"num_attention_heads": True}, "num_attention_heads=True, expected int"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'.*only 'silu'"),
        ({"use_sliding_window": True, "sliding_window": 16}, "use_sliding_window=True.*only False"),
        ({"num_hidden_layers": 3}, r"another architecture: missing \['layers.2"),
        ({"num_hidden_layers": 1}, r"surplus \['layers.1"),
        ({"intermediate_size": 65}, r"layers\.0\.feed_forward\.\w+\.weight has shape"),
    ],
)
def test_foreign_checkpoints_are_refused(tiny_checkpoint, tmp_path, fields, message):
    with pytest.raises(CheckpointError, match=message):
        load_model(edited(tiny_checkpoint, tmp_path, **fields))


def test_a_path_is_a_text():
    with pytest.raises(CheckpointError, match="the path of a model is None: give a folder or a Hub id"):
        load_model(None)


ABSENT = object()


def edited_llada(tmp_path, **fields):
    folder = shutil.copytree(GOLDEN / "llada_tiny", tmp_path / "llada")
    config = {**json.loads((folder / "config.json").read_text(encoding="utf-8")), **fields}
    kept = {field: value for field, value in config.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")
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
        ("clip_qkv", 8.0, "clip_qkv=8.0; only False"),
        ("d_model", ABSENT, "no d_model, which a model of model_type='llada' needs"),
        ("eos_token_id", ABSENT, "eos_token_id=None, expected int"),
        ("mask_token_id", "255", "mask_token_id='255', expected int"),
        ("rope_theta", None, "no rope_theta, expected a number above 0"),
        ("weight_tying", "yes", "weight_tying='yes', expected boolean"),
        ("weight_tying", True, "a head that differs: set weight_tying .* to false"),
    ],
)
def test_unknown_llada_variants_are_refused(tmp_path, field, value, message):
    folder = edited_llada(tmp_path, **{field: value})
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(folder, device="cpu")
    assert str(folder) in str(error.value)
    assert field in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("architectures", ["DreamForCausalLM"], r"only 'DreamModel' is known for Dream"),
        ("hidden_act", "gelu", "only 'silu'"),
        ("rope_scaling", {"rope_type": "yarn"}, "only False"),
        ("use_mrope", True, "only False"),
        ("use_sliding_window", True, "only False"),
        ("rope_theta", None, "no rope_theta, expected a number above 0"),
        ("mask_token_id", 256, r"outside the vocabulary \(0 to 255\)"),
        ("num_key_value_heads", 4, r"0.self_attn.k_proj.weight has shape \(32, 64\), .* says \(64, 64\)"),
        ("tie_word_embeddings", True, "a head that differs: set .* tie_word_embeddings to false"),
    ],
)
def test_unknown_dream_variants_are_refused(tmp_path, field, value, message):
    folder = shutil.copytree(GOLDEN / "dream_tiny", tmp_path / "dream")
    edit_json(folder / "config.json", **{field: value})
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(folder, device="cpu")
    assert str(folder) in str(error.value)


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


def test_a_tokenizer_without_the_models_mask_token_is_refused(tiny_checkpoint, tmp_path):
    foreign = edited(tiny_checkpoint, tmp_path, mask_token_id=51, vocab_size=52)
    with pytest.raises(CheckpointError, match=r"has no token 51, config\.json's mask_token_id \(50 tokens\)"):
        load_tokenizer(foreign)
    edit_json(foreign / "config.json", mask_token_id=7)
    with pytest.raises(CheckpointError, match=r"has mask token 1, config\.json has mask_token_id=7"):
        load_tokenizer(foreign)


def test_a_foreign_tokenizer_whose_word_is_at_the_masks_id_is_refused(tmp_path):
    folder = publish(tmp_path / "llada", "llada")
    words = Tokenizer(WordLevel({f"v{index}": index for index in range(300)}, unk_token="v0"))
    words.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(CheckpointError, match="has the ordinary token 'v255' at 255, .* a special one"):
        load_tokenizer(folder)
    words.add_tokens([AddedToken("v255", special=False)])  # an added token is not special either
    words.save(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="has the ordinary token 'v255' at 255"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "mask_token": "v255"}), encoding="utf-8"
    )
    assert load_tokenizer(folder).mask_token_id == 255
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": ["a"]}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer_class=\['a'\], expected a name"):
        load_tokenizer(folder)


def test_pickled_weights_are_not_read(tmp_path):
    folder = publish(tmp_path / "llada", "llada")
    for file in folder.glob("model*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        load_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"weights")
    with pytest.raises(
        CheckpointError, match=r"weights in pytorch_model\.bin, .* make safetensors of it with"
    ):
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
    (folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_model(folder)
    (folder / "config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json holds a list, expected an object"):
        load_model(folder)


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
