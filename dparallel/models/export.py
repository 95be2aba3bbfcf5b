"""Write a model for other programs: with a publisher's names, or with those of Llama and Qwen2.

original  names, files and config.json of LLaDA or Dream. The model code loads with plain `transformers`.
native    our own format.
llama     LLaDA's layers as `LlamaForCausalLM`, Dream's as `Qwen2ForCausalLM`, for inference engines.
"""

import inspect
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dparallel.config.decoding import DecodingConfig
from dparallel.config.modes import MODES
from dparallel.models import backbone, modeling_dparallel, names
from dparallel.models.backbone import DiffusionConfig, DiffusionTransformer
from dparallel.models.checkpoints import check_disk, name_as_before, save_model
from dparallel.models.commit_rule import write_commit_rule
from dparallel.models.config_file import ENDS, PATTERN
from dparallel.models.defaults import write_defaults
from dparallel.models.formats import FORMATS, CheckpointError, publishers, read_fields
from dparallel.models.names import Names
from dparallel.models.weights import INDEX, SINGLE
from dparallel.stages.files import naming_the_file, saving_folder

SHARD_BYTES = 5 * 10**9
# Config and model in modeling_dparallel.py, by model_type.
CLASSES = {"llada": ("LladaConfig", "LladaModel"), "Dream": ("DreamConfig", "DreamModel")}


def export_model(
    model: DiffusionTransformer,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    format: str,
    decoding: DecodingConfig | None = None,
) -> list[str]:
    """Write `model` and its tokenizer; returns the names of the files.

    Args:
        format: `original`, `native` or `llama`.
        decoding: how the written model code decodes by default, for `original`.

    Raises:
        CheckpointError: the format has no names or fields for this model, or the disk is full.
        FileError: the folder cannot be written.
    """
    if format == "native":
        return save_model(model, folder, tokenizer=tokenizer, format="native")
    if format == "llama":
        config, known = llama_config(model), names.LLAMA
    else:
        kind = original_type(model.config)
        config, known = original_config(model, kind, decoding), FORMATS[kind].names
    with naming_the_file(folder):
        folder.mkdir(parents=True, exist_ok=True)
        check_disk(model, folder)
        with saving_folder(folder) as place:
            tokenizer.save_pretrained(place)
            name_as_before(place / "tokenizer_config.json")
            _write_weights(model, known, place)
            _write_json(place / "config.json", config)
            if format == "original":
                _write_code(place)
            if model.commit_rule is not None:
                write_commit_rule(place, model.commit_rule)
            if model.defaults is not None and model.defaults.settings:
                write_defaults(place, model.defaults.settings, model.defaults.chosen)
            written = sorted(file.name for file in place.iterdir())
            for name in written:
                (place / name).replace(folder / name)
    return written


def original_type(config: DiffusionConfig) -> str:
    """`model_type` of the format with a publisher's names for a model: that of its family, or one that fits.

    Raises:
        CheckpointError: none fits.
    """
    reasons = []
    for kind in publishers(config.family):
        try:
            _fields(config, kind)
        except CheckpointError as error:
            reasons.append(str(error))
        else:
            return kind
    raise CheckpointError(f"no publisher's format has this model: {'; '.join(reasons)}; use native")


def original_config(
    model: DiffusionTransformer, kind: str, decoding: DecodingConfig | None = None
) -> dict[str, Any]:
    """config.json in a publisher's fields, with the section that `modeling_dparallel.py` reads."""
    config = model.config
    stated = inspect.signature(DiffusionConfig.__init__).parameters
    ours = {name: value for name, value in config.to_dict().items() if name in stated}
    section = {"model": ours, "names": patterns(FORMATS[kind].names), "decoding": _decoding(decoding)}
    return {
        **_fields(config, kind),
        "auto_map": {
            "AutoConfig": f"modeling_dparallel.{CLASSES[kind][0]}",
            "AutoModel": f"modeling_dparallel.{CLASSES[kind][1]}",
            "AutoModelForCausalLM": f"modeling_dparallel.{CLASSES[kind][1]}",
        },
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        "dparallel": section,
    }


def llama_config(model: DiffusionTransformer) -> dict[str, Any]:
    """config.json of a Llama, or of a Qwen2 for a model with biases of queries, keys and values.

    `dllm` says what an engine has to know beside these layers: the attention pattern, the mask token, and
    whether the logits of a position predict the next one.

    Raises:
        CheckpointError: neither has these layers.
    """
    config = model.config
    if config.qk_norm:
        raise CheckpointError("neither Llama nor Qwen2 has norms of queries and keys: give format='native'")
    kind = ("qwen2", "Qwen2ForCausalLM") if config.qkv_bias else ("llama", "LlamaForCausalLM")
    shared = {name: getattr(config, name) for name in _shape_names()}
    return {
        "model_type": kind[0],
        "architectures": [kind[1]],
        **shared,
        "hidden_act": "silu",
        "head_dim": config.head_size,
        **({} if config.qkv_bias else {"attention_bias": False, "mlp_bias": False}),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.end_token_ids),
        "pad_token_id": config.pad_token_id,
        "mask_token_id": config.mask_token_id,
        "is_causal": config.attention_pattern == "causal",
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        "dllm": {
            "attention": config.attention_pattern or "full",
            "mask_token_id": config.mask_token_id,
            "logits": "of the next position" if config.predicts_next else "of the same position",
        },
    }


def patterns(known: Names) -> dict[str, str]:
    """Regular expressions of a format's names and our names for them, as `key_mapping` of transformers."""
    layer = r"layers.\1."
    found = {}
    for native in (*names.TOP, *(f"layers.0.{inner}" for inner in names.LAYER)):
        published = re.escape(known.published(native)).replace(r"\.0\.", r"\.(\d+)\.")
        found[rf"^{published}\."] = native.replace("layers.0.", layer) + "."
    return found


def _fields(config: DiffusionConfig, kind: str) -> dict[str, Any]:
    """A publisher's config.json of a model, which reads as the same model."""
    known = FORMATS[kind]
    called = known.fields.names
    stated = {called.get(name, name): getattr(config, name) for name in (*_shape_names(), "mask_token_id")}
    stated |= {name: getattr(config, name) for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
    if stated["pad_token_id"] is None:
        stated["pad_token_id"] = stated["eos_token_id"]
    if kind == "llada":
        stated |= {"include_qkv_bias": config.qkv_bias, "embedding_size": config.vocab_size}
    try:
        fields = known.fields.model_validate(stated)
    except ValidationError as error:
        raise CheckpointError(f"{kind} has no {error.errors()[0]['loc'] or 'such heads'}") from error
    architecture = {"llada": "LLaDAModelLM", "Dream": "DreamModel"}[kind]
    written = {
        "model_type": kind,
        "architectures": [architecture],
        **fields.model_dump(by_alias=True, exclude_none=True, exclude={"architectures"}),
        ENDS: list(config.end_token_ids),
    }
    if config.attention_pattern is not None:
        written[PATTERN] = config.attention_pattern
    read = read_fields(written, "config.json")[1]
    for name in (*_shape_names(), "head_size", "qkv_bias", "qk_norm", "predicts_next"):
        other, own = getattr(read, name), getattr(config, name)
        if other != own:
            raise CheckpointError(f"{kind} has {name}={other!r} here, and this model {own!r}")
    return written


def _shape_names() -> tuple[str, ...]:
    return (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rope_theta",
        "rms_norm_eps",
        "tie_word_embeddings",
    )


def generates(config: DiffusionConfig, decoding: DecodingConfig) -> bool:
    """Whether `PublishedModel.generate` gives the responses of `decoding`."""
    fits = config.attention_pattern in MODES["sequential"].patterns
    return fits and decoding.cache == "none" and _has_settings(decoding)


def _has_settings(decoding: DecodingConfig) -> bool:
    known = decoding.mode == "sequential" and decoding.rule in modeling_dparallel.RULES
    return known and not (decoding.temperature or decoding.eos_fill or decoding.suppress_eos)


def _decoding(decoding: DecodingConfig | None) -> dict[str, Any]:
    """Settings of `PublishedModel.generate`; those built in if it cannot decode in this way."""
    chosen = decoding or DecodingConfig()
    if not _has_settings(chosen):
        chosen = DecodingConfig(gen_length=chosen.gen_length, block_length=chosen.block_length)
    known = ("gen_length", "block_length", "rule", "threshold", "steps", "stop_at_eos")
    return {name: getattr(chosen, name) for name in known if getattr(chosen, name) is not None}


def _write_weights(model: DiffusionTransformer, known: Names, folder: Path) -> None:
    """Weights in one file, or in several of at most `SHARD_BYTES` with an index."""
    tensors = {known.published(name): tensor for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors[known.published("lm_head.weight")]
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.cpu().contiguous()
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / SINGLE, metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_code(folder: Path) -> None:
    """The model code, with imports from the files beside it."""
    shutil.copyfile(backbone.__file__, folder / "backbone.py")
    code = Path(modeling_dparallel.__file__).read_text(encoding="utf-8")
    code = code.replace("from dparallel.models.backbone import", "from .backbone import")
    (folder / "modeling_dparallel.py").write_text(code, encoding="utf-8")


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
