"""Checkpoints that are refused, with the reason."""

import json
import shutil

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel

from dparallel import load_model, load_tokenizer
from dparallel.models.formats import CheckpointError
from tests.conftest import GOLDEN
from tests.dparallel.models.published import ABSENT, edit_json, edited, edited_llada, publish


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
