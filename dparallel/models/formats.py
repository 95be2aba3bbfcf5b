"""The formats of checkpoints: ours, LLaDA's and Dream's. Their config fields and tensor names, and nothing
of files.

All that is particular to a family stops here; the rest of the project sees one model.
"""

import math
from collections.abc import Callable
from types import NoneType
from typing import Any, NamedTuple

from dparallel.config.base import UserError
from dparallel.models.backbone import DiffusionConfig


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written; the message names the file, the field or the tensor."""


class Kind(NamedTuple):
    """What a field may hold. NoneType: it may be absent."""

    types: tuple[type, ...]
    limit: str = ""
    fits: Callable[[Any], bool] = lambda value: True


class Format(NamedTuple):
    """One ecosystem's way to write a checkpoint: its config fields and its tensor names."""

    fields: dict[str, Kind]  # that are read
    heads: tuple[
        str, str, str
    ]  # the fields of the hidden size and of the counts of heads and key/value heads
    fixed: dict[str, Any]  # fields of which another value means another architecture
    config: Callable[[dict[str, Any]], DiffusionConfig]
    tensor_name: Callable[[str], str]  # its name of a tensor -> ours


def find_format(raw: dict[str, Any], file: object) -> Format:
    """The format whose `model_type` the fields of a config.json state.

    Raises:
        CheckpointError: an unknown one, or fields it does not know to handle; `file` is named.
    """
    known = FORMATS.get(str(raw.get("model_type")))
    if known is None:
        raise CheckpointError(f"{file} has model_type={raw.get('model_type')!r}; known: {', '.join(FORMATS)}")
    for field, kind in known.fields.items():
        value = raw.get(field)
        if type(value) not in kind.types:  # not isinstance: a bool is no int here
            expected = " or ".join(each.__name__ for each in kind.types)
            raise CheckpointError(f"{file} has {field}={value!r}, expected {expected}")
        if value is not None and not kind.fits(value):
            raise CheckpointError(f"{file} has {field}={value!r}, expected one {kind.limit}")
    for field, value in known.fixed.items():
        found = raw.get(field, value)
        if found != value and (found or value):  # null is as good as false
            raise CheckpointError(
                f"{file} has {field}={found!r}; only {value!r} is known for {raw['model_type']}"
            )
    _check_heads(raw, known.heads, file)
    return known


def _check_heads(raw: dict[str, Any], fields: tuple[str, str, str], file: object) -> None:
    """Heads share the hidden size evenly, groups of them share keys, and rotation needs pairs."""
    size, heads, groups = (raw.get(field) for field in fields)
    assert isinstance(size, int)  # as was found above
    assert isinstance(heads, int)
    if size % (2 * heads):
        raise CheckpointError(
            f"{file} has {fields[0]}={size} and {fields[1]}={heads}, expected a multiple of twice the heads"
        )
    if groups and heads % groups:
        raise CheckpointError(
            f"{file} has {fields[1]}={heads} and {fields[2]}={groups}, expected a divisor of the heads"
        )
    if raw.get("head_dim") not in (None, size // heads):
        raise CheckpointError(
            f"{file} has head_dim={raw['head_dim']!r}; only {fields[0]} / {fields[1]} = {size // heads}"
        )


def is_computed(name: str) -> bool:
    """Whether a tensor only repeats what config.json says, as rotary frequencies that old code stored do."""
    return name.endswith(".inv_freq")


_INTEGER, _OPTIONAL_INTEGER = Kind((int,)), Kind((int, NoneType))
_COUNT = Kind((int,), "of at least 1", lambda value: value > 0)
_OPTIONAL_COUNT = _COUNT._replace(types=(int, NoneType))
_POSITIVE = Kind((int, float), "above 0 and finite", lambda value: 0 < value < math.inf)
_OPTIONAL_SWITCH = Kind((bool, NoneType))

_HEADS = ("hidden_size", "num_attention_heads", "num_key_value_heads")
_NATIVE_FIELDS = {
    "vocab_size": _COUNT,
    "hidden_size": _COUNT,
    "intermediate_size": _COUNT,
    "num_hidden_layers": _COUNT,
    "num_attention_heads": _COUNT,
    "num_key_value_heads": _OPTIONAL_COUNT,
    "max_position_embeddings": _COUNT,
    "rope_theta": _POSITIVE,
    "rms_norm_eps": _POSITIVE,
    "qkv_bias": _OPTIONAL_SWITCH,
    "tie_word_embeddings": _OPTIONAL_SWITCH,
    "predicts_next": _OPTIONAL_SWITCH,
    "mask_token_id": _INTEGER,
    "eos_token_id": _OPTIONAL_INTEGER,
    "pad_token_id": _OPTIONAL_INTEGER,
}


def _native_config(raw: dict[str, Any]) -> DiffusionConfig:
    return DiffusionConfig.from_dict(raw)


_LLADA_FIELDS = {
    "vocab_size": _COUNT,
    "embedding_size": _OPTIONAL_COUNT,
    "d_model": _COUNT,
    "mlp_hidden_size": _COUNT,
    "n_layers": _COUNT,
    "n_heads": _COUNT,
    "n_kv_heads": _OPTIONAL_COUNT,
    "max_sequence_length": _COUNT,
    "rope_theta": _POSITIVE,
    "rms_norm_eps": _POSITIVE,
    "include_qkv_bias": _OPTIONAL_SWITCH,
    "weight_tying": _OPTIONAL_SWITCH,
    "mask_token_id": _INTEGER,
    "eos_token_id": _INTEGER,
    "pad_token_id": _INTEGER,
}
_LLADA_HEADS = ("d_model", "n_heads", "n_kv_heads")
_LLADA_FIXED = {
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
    "rope": True,
    "rope_full_precision": True,
    "rope_scaling": None,
    "alibi": False,
    "include_bias": False,
    "attention_layer_norm": False,
    "multi_query_attention": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "clip_qkv": None,
}


def _llada_config(raw: dict[str, Any]) -> DiffusionConfig:
    return DiffusionConfig(
        vocab_size=raw.get("embedding_size") or raw["vocab_size"],
        hidden_size=raw["d_model"],
        intermediate_size=raw["mlp_hidden_size"],
        num_hidden_layers=raw["n_layers"],
        num_attention_heads=raw["n_heads"],
        num_key_value_heads=raw.get("n_kv_heads"),
        max_position_embeddings=raw["max_sequence_length"],
        rope_theta=raw["rope_theta"],
        rms_norm_eps=raw["rms_norm_eps"],
        qkv_bias=bool(raw.get("include_qkv_bias")),
        tie_word_embeddings=bool(raw.get("weight_tying")),
        mask_token_id=raw["mask_token_id"],
        eos_token_id=raw["eos_token_id"],
        pad_token_id=raw["pad_token_id"],
        family="llada",
    )


_LLADA_TOP = {"wte": "embedding", "ln_f": "norm", "ff_out": "lm_head"}
_LLADA_LAYER = {
    "attn_norm": "attention_norm",
    "q_proj": "attention.q_proj",
    "k_proj": "attention.k_proj",
    "v_proj": "attention.v_proj",
    "attn_out": "attention.o_proj",
    "ff_norm": "feed_forward_norm",
    "ff_proj": "feed_forward.gate_proj",
    "up_proj": "feed_forward.up_proj",
    "ff_out": "feed_forward.down_proj",
}


def _llada_tensor(name: str) -> str:
    """`model.transformer.blocks.0.attn_out.weight` -> `layers.0.attention.o_proj.weight`."""
    parts = name.removeprefix("model.transformer.").split(".")
    if parts[0] == "blocks" and len(parts) == 4:
        return ".".join(["layers", parts[1], _LLADA_LAYER.get(parts[2], parts[2]), parts[3]])
    return ".".join([_LLADA_TOP.get(parts[0], parts[0]), *parts[1:]])


_DREAM_FIELDS = {
    "vocab_size": _COUNT,
    "hidden_size": _COUNT,
    "intermediate_size": _COUNT,
    "num_hidden_layers": _COUNT,
    "num_attention_heads": _COUNT,
    "num_key_value_heads": _OPTIONAL_COUNT,
    "max_position_embeddings": _COUNT,
    "rope_theta": _POSITIVE,
    "rms_norm_eps": _POSITIVE,
    "tie_word_embeddings": _OPTIONAL_SWITCH,
    "mask_token_id": _INTEGER,
    "eos_token_id": _OPTIONAL_INTEGER,
    "pad_token_id": _OPTIONAL_INTEGER,
    "bos_token_id": _OPTIONAL_INTEGER,
}
_DREAM_FIXED = {
    "architectures": ["DreamModel"],  # others of this model_type are causal in blocks, or do not shift
    "hidden_act": "silu",
    "attention_bias": True,  # of queries, keys and values; most do not say it
    "rope_scaling": None,
    "use_mrope": False,
    "use_sliding_window": False,
}


def _dream_config(raw: dict[str, Any]) -> DiffusionConfig:
    return DiffusionConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=raw["num_attention_heads"],
        num_key_value_heads=raw.get("num_key_value_heads"),
        max_position_embeddings=raw["max_position_embeddings"],
        rope_theta=raw["rope_theta"],
        rms_norm_eps=raw["rms_norm_eps"],
        qkv_bias=True,  # no field says so: its modeling code always has them
        tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
        mask_token_id=raw["mask_token_id"],
        eos_token_id=raw.get("eos_token_id"),
        pad_token_id=raw.get("pad_token_id"),
        bos_token_id=raw.get("bos_token_id"),
        family="dream",
        predicts_next=True,
    )


_DREAM_TOP = {"embed_tokens": "embedding"}
_DREAM_LAYER = {
    "input_layernorm": "attention_norm",
    "self_attn": "attention",
    "post_attention_layernorm": "feed_forward_norm",
    "mlp": "feed_forward",
}


def _dream_tensor(name: str) -> str:
    """`model.layers.0.mlp.up_proj.weight` -> `layers.0.feed_forward.up_proj.weight`."""
    parts = name.removeprefix("model.").split(".")
    if parts[0] == "layers" and len(parts) > 3:
        return ".".join(["layers", parts[1], _DREAM_LAYER.get(parts[2], parts[2]), *parts[3:]])
    return ".".join([_DREAM_TOP.get(parts[0], parts[0]), *parts[1:]])


NATIVE = "dparallel"
FORMATS = {
    NATIVE: Format(_NATIVE_FIELDS, _HEADS, {}, _native_config, lambda name: name),
    "llada": Format(_LLADA_FIELDS, _LLADA_HEADS, _LLADA_FIXED, _llada_config, _llada_tensor),
    "Dream": Format(_DREAM_FIELDS, _HEADS, _DREAM_FIXED, _dream_config, _dream_tensor),
}
