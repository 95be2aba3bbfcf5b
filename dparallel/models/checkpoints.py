"""Checkpoints in and out: our own format, and LLaDA's original one (its field and tensor names).

All that is particular to a family stops here; the rest of the project sees one model.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import NoneType
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from dparallel.models.backbone import DiffusionConfig, DiffusionTransformer

# Where this package is imported, transformers' auto classes know our format. A saved model also
# carries backbone.py, so that without this package trust_remote_code=True loads it.
AutoConfig.register("dparallel", DiffusionConfig)
AutoModel.register(DiffusionConfig, DiffusionTransformer)
DiffusionConfig.register_for_auto_class()
DiffusionTransformer.register_for_auto_class("AutoModel")


WRITABLE = ("native",)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file, the field or the tensor."""


class Format(NamedTuple):
    """One ecosystem's way to write a checkpoint: its config fields and its tensor names."""

    fields: dict[str, tuple[type, ...]]  # what the fields read may hold; NoneType: may be absent
    fixed: dict[str, Any]  # fields of which another value means another architecture
    config: Callable[[dict[str, Any]], DiffusionConfig]
    tensor_name: Callable[[str], str]


def load_model(
    path: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> DiffusionTransformer:
    """Load a masked diffusion model for inference, without running the checkpoint's own code.

    Args:
        path: a folder, or the name of a repository on the hub.
        device: where to put it; a GPU if there is one unless told.
        dtype: None keeps the checkpoint's.

    Raises:
        CheckpointError: no such checkpoint, one of another architecture, or missing, surplus or
            misshapen tensors.
    """
    folder = _folder(path)
    known, config = _read_config(folder)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt", device=str(device)) as shard:
                for name in shard.keys():  # noqa: SIM118 (not a dict)
                    tensors[known.tensor_name(name)] = shard.get_tensor(name).to(dtype)
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged or cut short: {error}") from error
    with torch.device("meta"):
        model = DiffusionTransformer(config)
    if config.tie_word_embeddings:
        _tie_head(folder, tensors)
    _check_tensors(folder, model, tensors)
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie_weights()
    return model.eval()


def read_config(path: str | Path) -> DiffusionConfig:
    """The model's shape and special tokens, without its weights; raises as `load_model` does."""
    folder = _folder(path)
    _weight_files(folder)
    return _read_config(folder)[1]


def save_model(
    model: DiffusionTransformer,
    path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    format: str = "native",
) -> list[str]:
    """Write our own format; loads with `load_model` and with plain `transformers`.

    Args:
        tokenizer: saved beside the model.
        format: one of `WRITABLE`.

    Returns:
        The names of the files written, in order.

    Raises:
        ValueError: a format that cannot be written.
    """
    if format not in WRITABLE:
        raise ValueError(f"format={format!r} cannot be written; formats that can: {', '.join(WRITABLE)}")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".saving-") as partial:
        transformers_logging.disable_progress_bar()
        model.save_pretrained(partial)
        transformers_logging.enable_progress_bar()
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        names = sorted(os.listdir(partial))
        for name in names:
            os.replace(Path(partial, name), folder / name)
    return names


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, from a folder or the hub."""
    folder = _folder(path)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} has no tokenizer that transformers can load: {error}") from error


def _folder(path: str | Path) -> Path:
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(
            snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} is neither a folder here ({Path.cwd()}) nor a model on the hub ({reason})"
        ) from error


def _read_config(folder: Path) -> tuple[Format, DiffusionConfig]:
    raw = _read_json(folder / "config.json")
    known = FORMATS.get(str(raw.get("model_type")))
    if known is None:
        raise CheckpointError(
            f"{folder}/config.json has model_type={raw.get('model_type')!r}; known: {', '.join(FORMATS)}"
        )
    _check_fields(folder / "config.json", raw, known)
    config = known.config(raw)
    if not 0 <= config.mask_token_id < config.vocab_size:
        raise CheckpointError(
            f"{folder}/config.json has mask_token_id={config.mask_token_id}, outside the vocabulary "
            f"(0 to {config.vocab_size - 1})"
        )
    return known, config


def _check_fields(file: Path, raw: dict[str, Any], known: Format) -> None:
    for field, types in known.fields.items():
        if type(raw.get(field)) not in types:  # not isinstance: a bool is no int here
            expected = " or ".join(each.__name__ for each in types)
            raise CheckpointError(f"{file} has {field}={raw.get(field)!r}, expected {expected}")
    for field, value in known.fixed.items():
        found = raw.get(field, value)
        if found != value and (found or value):  # null is as good as false
            raise CheckpointError(
                f"{file} has {field}={found!r}; only {value!r} is known for {raw['model_type']}"
            )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.parent} holds no config.json: not a model's folder") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, expected an object of fields")
    return content


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing: the checkpoint is incomplete")
    return [folder / name for name in names]


def _tie_head(folder: Path, tensors: dict[str, Tensor]) -> None:
    """One matrix embeds and predicts; a head of its own beside it may only repeat it."""
    embedding = tensors.get("embedding.weight")
    if embedding is not None and not torch.equal(tensors.setdefault("lm_head.weight", embedding), embedding):
        raise CheckpointError(
            f"{folder}/config.json ties the head to the embedding, but the weights hold a head that differs: "
            "set weight_tying (tie_word_embeddings in our own format) to false"
        )


def _check_tensors(folder: Path, model: DiffusionTransformer, tensors: dict[str, Tensor]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing, surplus = sorted(expected.keys() - tensors), sorted(tensors.keys() - expected)
    if missing or surplus:
        raise CheckpointError(
            f"{folder} is a checkpoint of another architecture: missing {missing[:3] or 'nothing'}, "
            f"surplus {surplus[:3] or 'nothing'}"
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(
                f"{folder}: tensor {name} has shape {tuple(tensors[name].shape)}, config.json says {shape}"
            )


_INTEGER, _OPTIONAL_INTEGER = (int,), (int, NoneType)
_NUMBER, _OPTIONAL_SWITCH = (int, float), (bool, NoneType)

_NATIVE_FIELDS = {
    "vocab_size": _INTEGER,
    "hidden_size": _INTEGER,
    "intermediate_size": _INTEGER,
    "num_hidden_layers": _INTEGER,
    "num_attention_heads": _INTEGER,
    "num_key_value_heads": _OPTIONAL_INTEGER,
    "max_position_embeddings": _INTEGER,
    "rope_theta": _NUMBER,
    "rms_norm_eps": _NUMBER,
    "qkv_bias": _OPTIONAL_SWITCH,
    "tie_word_embeddings": _OPTIONAL_SWITCH,
    "mask_token_id": _INTEGER,
    "eos_token_id": _OPTIONAL_INTEGER,
    "pad_token_id": _OPTIONAL_INTEGER,
}


def _native_config(raw: dict[str, Any]) -> DiffusionConfig:
    return DiffusionConfig.from_dict(raw)


_LLADA_FIELDS = {
    "vocab_size": _INTEGER,
    "embedding_size": _OPTIONAL_INTEGER,
    "d_model": _INTEGER,
    "mlp_hidden_size": _INTEGER,
    "n_layers": _INTEGER,
    "n_heads": _INTEGER,
    "n_kv_heads": _OPTIONAL_INTEGER,
    "max_sequence_length": _INTEGER,
    "rope_theta": _NUMBER,
    "rms_norm_eps": _NUMBER,
    "include_qkv_bias": _OPTIONAL_SWITCH,
    "weight_tying": _OPTIONAL_SWITCH,
    "mask_token_id": _INTEGER,
    "eos_token_id": _INTEGER,
    "pad_token_id": _INTEGER,
}
_LLADA_FIXED = {
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
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


FORMATS = {
    "dparallel": Format(_NATIVE_FIELDS, {}, _native_config, lambda name: name),
    "llada": Format(_LLADA_FIELDS, _LLADA_FIXED, _llada_config, _llada_tensor),
}
