"""Invalid and unsupported fields of a config.json, and those of the published models."""

import json
from typing import Any

import pytest

from dparallel.models.formats import CheckpointError, read_fields
from tests.conftest import GOLDEN

LLADA_8B = {  # published fields of GSAI-ML/LLaDA-8B-Instruct, except those for training
    **{"model_type": "llada", "architectures": ["LLaDAModelLM"], "activation_type": "silu", "alibi": False},
    **{"attention_layer_norm": False, "bias_for_layer_norm": False, "block_group_size": 1},
    **{"block_type": "llama", "d_model": 4096, "embedding_size": 126464, "eos_token_id": 126081},
    **{"include_bias": False, "include_qkv_bias": False, "input_emb_norm": False, "layer_norm_type": "rms"},
    **{"layer_norm_with_affine": True, "mask_token_id": 126336, "max_sequence_length": 4096},
    **{"mlp_hidden_size": 12288, "mlp_ratio": 4, "multi_query_attention": None, "n_heads": 32},
    **{"n_kv_heads": 32, "n_layers": 32, "pad_token_id": 126081, "rms_norm_eps": 1e-05, "rope": True},
    **{"rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False, "vocab_size": 126464},
    "weight_tying": False,
}
DREAM_7B = {  # Dream-org/Dream-v0-Instruct-7B
    **{"model_type": "Dream", "architectures": ["DreamModel"], "attention_dropout": 0.0},
    **{"bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584},
    **{"intermediate_size": 18944, "mask_token_id": 151666, "max_position_embeddings": 131072},
    **{"num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4},
    **{"pad_token_id": 151643, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0},
    **{"sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
    **{"use_mrope": False, "use_sliding_window": False, "vocab_size": 152064},
}


def test_the_published_models_are_known() -> None:
    llada = read_fields(LLADA_8B, "config.json")[1]
    assert (llada.num_hidden_layers, llada.num_key_value_heads, llada.qkv_bias) == (32, 32, False)
    dream = read_fields(DREAM_7B, "config.json")[1]
    assert (dream.num_hidden_layers, dream.num_key_value_heads, dream.qkv_bias) == (28, 4, True)


@pytest.mark.parametrize(
    ("family", "field", "value", "message"),
    [
        ("llada", "n_heads", 0, "n_heads=0, expected at least 1"),
        ("llada", "n_heads", -4, "n_heads=-4, expected at least 1"),
        ("llada", "n_heads", 3, "d_model=64 and n_heads=3, expected a multiple of twice the heads"),
        ("llada", "n_heads", 64, "d_model=64 and n_heads=64, expected a multiple of twice the heads"),
        ("llada", "n_kv_heads", 0, "n_kv_heads=0, expected at least 1"),
        ("llada", "n_kv_heads", 3, "n_heads=4 and n_kv_heads=3, expected a divisor of the heads"),
        ("llada", "n_layers", 0, "n_layers=0, expected at least 1"),
        ("llada", "max_sequence_length", 0, "max_sequence_length=0, expected at least 1"),
        ("llada", "rope_theta", 0, "rope_theta=0, expected above 0"),
        ("llada", "rope_theta", float("nan"), "rope_theta=nan, expected a finite number"),
        ("llada", "rope_theta", float("inf"), "rope_theta=inf, expected a finite number"),
        ("llada", "rms_norm_eps", -1e-5, "rms_norm_eps=-1e-05, expected above 0"),
        ("llada", "rope_scaling", {"type": "linear", "factor": 2}, "only False is known for llada"),
        ("llada", "layer_norm_with_affine", False, "only True is known for llada"),
        ("llada", "rope_full_precision", False, "only True is known for llada"),
        ("llada", "bias_for_layer_norm", True, "only False is known for llada"),
        ("llada", "n_layers", 10**9, "n_layers=1000000000, expected at most 1000"),
        ("llada", "vocab_size", 10**4000, r"vocab_size=10{199}…, expected at most 268435456"),
        ("dream", "rope_scaling", {"rope_type": "yarn"}, "only False is known for Dream"),
        (
            "dream",
            "rope_parameters",
            {"rope_type": "yarn", "factor": 4.0},
            "only 'default' is known for Dream",
        ),
        ("dream", "rope_parameters", {"full_attention": {"rope_theta": 1e4}}, "full_attention is not known"),
        ("dream", "rope_parameters", {"rope_theta": 0}, "expected above 0"),
        (
            "dream",
            "rope_parameters",
            {"rope_theta": 5e4},
            r"rope_theta=.* and rope_parameters.rope_theta=50000.0",
        ),
        ("llada", "partial_rotary_factor", 0.5, "partial_rotary_factor=0.5; only 1 is known for llada"),
        ("dream", "partial_rotary_factor", 0.5, "partial_rotary_factor=0.5; only 1 is known for Dream"),
        ("dream", "rope_parameters", [1], "expected a? ?.*dictionary"),
        ("dream", "head_dim", 8, "head_dim=8; only hidden_size / num_attention_heads = 16"),
        ("dream", "attention_bias", False, "attention_bias=False; only True is known for Dream"),
        ("dream", "num_attention_heads", 3, "hidden_size=64 and num_attention_heads=3"),
        ("dream", "num_key_value_heads", 3, "num_attention_heads=4 and num_key_value_heads=3"),
        ("dream", "rms_norm_eps", 0.0, "rms_norm_eps=0.0, expected above 0"),
    ],
)
def test_fields_that_cannot_be_computed_are_refused(
    family: str, field: str, value: Any, message: str
) -> None:
    raw = json.loads((GOLDEN / f"{family}_tiny" / "config.json").read_text(encoding="utf-8"))
    read_fields(raw, "config.json")
    with pytest.raises(CheckpointError, match="config.json has .*" + message):
        read_fields({**raw, field: value}, "config.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [("head_dim", 16), ("head_dim", None), ("attention_bias", True), ("partial_rotary_factor", 1.0)],
)
def test_fields_that_say_what_is_computed_are_accepted(field: str, value: Any) -> None:
    raw = json.loads((GOLDEN / "dream_tiny" / "config.json").read_text(encoding="utf-8"))
    read_fields({**raw, field: value}, "config.json")


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_rotary_positions_may_be_written_as_transformers_5_writes_them(family: str) -> None:
    raw = json.loads((GOLDEN / f"{family}_tiny" / "config.json").read_text(encoding="utf-8"))
    before = read_fields(raw, "config.json")[1].rope_theta
    theta = raw.pop("rope_theta")
    for written in ({"rope_type": "default", "rope_theta": theta}, {"rope_theta": theta}):
        assert read_fields({**raw, "rope_parameters": written}, "config.json")[1].rope_theta == before
    with pytest.raises(CheckpointError, match=r"config\.json has no rope_theta, expected a number above 0"):
        read_fields({**raw, "rope_parameters": {"rope_type": "default"}}, "config.json")
