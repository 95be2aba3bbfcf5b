"""Invalid and unsupported fields of a config.json, and those of the published models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from dparallel import load_model, save_model
from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.generate import generate
from dparallel.decoding.oracle import decode_one
from dparallel.models.backbone import DiffusionConfig, DiffusionTransformer
from dparallel.models.formats import CheckpointError, read_fields
from dparallel.models.names import LLAMA
from dparallel.models.unsupported import UNSUPPORTED
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
# GSAI-ML/LLaDA-1.5: LLaDA-8B's architecture; it sets use_cache and flash_attention, which nothing here reads.
LLADA_15 = {**LLADA_8B, "flash_attention": True, "use_cache": True, "torch_dtype": "bfloat16"}
DREAM_7B = {  # Dream-org/Dream-v0-Instruct-7B
    **{"model_type": "Dream", "architectures": ["DreamModel"], "attention_dropout": 0.0},
    **{"bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584},
    **{"intermediate_size": 18944, "mask_token_id": 151666, "max_position_embeddings": 131072},
    **{"num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4},
    **{"pad_token_id": 151643, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0},
    **{"sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
    **{"use_mrope": False, "use_sliding_window": False, "vocab_size": 152064},
}
# apple/DiffuCoder-7B-Instruct; its tokenizer pads with <|dlm_pad|>, config.json with <|endoftext|>.
DIFFUCODER = {
    **{"model_type": "Dream", "architectures": ["DreamModel"], "attention_dropout": 0.0},
    **{
        "auto_map": {
            "AutoConfig": "configuration_dream.DreamConfig",
            "AutoModel": "modeling_dream.DreamModel",
        }
    },
    **{"bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584},
    **{"initializer_range": 0.02, "intermediate_size": 18944, "mask_token_id": 151666},
    **{"max_position_embeddings": 131072, "max_window_layers": 28, "num_attention_heads": 28},
    **{"num_hidden_layers": 28, "num_key_value_heads": 4, "pad_token_id": 151643, "rms_norm_eps": 1e-06},
    **{"rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False},
    **{"torch_dtype": "bfloat16", "transformers_version": "4.51.3", "use_cache": False, "use_mrope": False},
    **{"use_sliding_window": False, "vocab_size": 152064},
}
DREAM_CODER = {  # Dream-org/Dream-Coder-v0-Instruct-7B: a BOS token of its own, no use_mrope
    **{name: value for name, value in DIFFUCODER.items() if name != "use_mrope"},
    **{"bos_token_id": 151665, "max_position_embeddings": 32768, "use_cache": True},
    "transformers_version": "4.46.2",
}
FAMILY = {"LLaDA-1.5": LLADA_15, "Dream-Coder": DREAM_CODER, "DiffuCoder": DIFFUCODER}
TINY = {  # the same config with few, narrow layers: numbers of heads and groups divide as the published ones
    "llada": {"d_model": 32, "mlp_hidden_size": 48, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4},
    "Dream": {"hidden_size": 56, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 28},
}


LARGE = {"Dream-Coder", "DiffuCoder"}  # their vocabulary takes a second each


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in FAMILY]
)
def test_a_tiny_checkpoint_of_every_published_config_loads_and_decodes(name: str, tmp_path: Path) -> None:
    raw = {**FAMILY[name], **TINY[FAMILY[name]["model_type"]]}
    known, config = read_fields(raw, "config.json")
    torch.manual_seed(0)
    config.initializer_range = 0.3
    model = DiffusionTransformer(config)
    weights = {known.names.published(name): tensor for name, tensor in model.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    loaded = load_model(tmp_path, "cpu")
    assert loaded.config.predicts_next == (raw["model_type"] == "Dream")
    assert loaded.config.num_key_value_heads == 4
    ids = [5, 126336 // 2, 9]
    decoding = DecodingConfig(gen_length=4, block_length=4, rule="steps", steps=2)
    [generation] = generate(loaded, [ids], decoding)
    plain = decode_one(loaded, ids, decoding)
    assert (generation.tokens, generation.nfe) == (plain.tokens, 2)
    save_model(loaded, tmp_path / "copy", format="original")
    assert load_file(tmp_path / "copy" / "model.safetensors").keys() == weights.keys()
    assert json.loads((tmp_path / "copy" / "config.json").read_text(encoding="utf-8")) == raw


def test_heads_of_another_size_and_norms_of_queries_and_keys_are_those_of_qwen3(tmp_path: Path) -> None:
    """Against transformers' own Qwen3, which attends in both directions under a mask that hides nothing."""
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    reference = Qwen3ForCausalLM(config).eval()
    for name, weight in reference.named_parameters():
        torch.nn.init.normal_(weight, 1.0 if "norm" in name else 0.0, 0.3)
    shape = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
    shape |= {"max_position_embeddings": 64, "rms_norm_eps": 1e-6, "qk_norm": True}
    shape |= {"mask_token_id": 1, "eos_token_id": 2}
    ours = DiffusionTransformer(DiffusionConfig(**shape)).eval()
    ours.load_state_dict({LLAMA.native(name): tensor for name, tensor in reference.state_dict().items()})
    ids = torch.randint(2, 64, (2, 20))
    with torch.no_grad():
        expected = reference(ids, attention_mask=torch.zeros(2, 1, 20, 20)).logits
        torch.testing.assert_close(ours(ids), expected, atol=2e-5, rtol=1e-5)

    ours.save_pretrained(tmp_path)  # the native format states both
    loaded = load_model(tmp_path, "cpu")
    prompts = [[5, 7, 9, 11], [6, 3]]
    for settings in ({}, {"cache": "prefix"}, {"cache": "dual"}):
        decoding = DecodingConfig(gen_length=12, block_length=4, rule="confidence", threshold=0.4, **settings)
        for prompt, generation in zip(prompts, generate(loaded, prompts, decoding), strict=True):
            plain = decode_one(loaded, prompt, decoding)
            assert (generation.tokens, generation.nfe) == (plain.tokens, plain.nfe)


@pytest.mark.parametrize("kind", [*UNSUPPORTED, "llada21_moe"])
def test_other_architectures_are_refused_by_name_with_what_they_need(kind: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config.json is of .* \(model_type='{kind}'\), which needs "):
        read_fields({"model_type": kind}, "config.json")
    known = UNSUPPORTED.get(kind, UNSUPPORTED["llada2_moe"])
    page = (Path(__file__).parents[3] / "docs" / "method.md").read_text(encoding="utf-8")
    assert f"| {known.models} | `{kind if kind in UNSUPPORTED else 'llada2_moe'}` | {known.needs} |" in page


def test_a_mixture_of_experts_under_the_type_of_llada_is_refused_as_what_it_is() -> None:
    """LLaDA-MoE's config.json says `llada`."""
    with pytest.raises(CheckpointError, match=r"is of LLaDA-MoE-7B-A1B \(model_type='llada'\), which"):
        read_fields({"model_type": "llada", "num_experts": 64, "qk_layernorm": True}, "config.json")


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
