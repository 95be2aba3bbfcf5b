"""Read a checkpoint's config.json and related files: the model's shape and special tokens."""

from pathlib import Path
from typing import Any

from dparallel.models.backbone import DiffusionConfig
from dparallel.models.end_tokens import stated_ids, tokenizer_end_ids
from dparallel.models.formats import CheckpointError, Format, read_fields
from dparallel.models.weights import read_json

# Fields of config.json written by this project only.
ENDS = "end_token_ids"
PATTERN, PATTERNS = "attention_pattern", ("full", "block_causal", "causal")


def read_config_file(folder: Path) -> tuple[Format, DiffusionConfig]:
    """The format of a checkpoint's config.json, and the model it describes.

    Raises:
        CheckpointError: config.json is missing or describes no supported model.
    """
    file = folder / "config.json"
    if not file.is_file():
        inside = sorted(str(found.parent) for found in folder.glob("*/config.json"))
        models = f"; models in it: {', '.join(inside)}" if inside else ""
        raise CheckpointError(f"{folder} holds no config.json: not a model's folder{models}")
    raw, beside = read_json(file), folder / "generation_config.json"
    generation = read_json(beside) if beside.is_file() else {}
    named = [
        (place, field, stated_ids(fields, field, place))
        for place, fields, field in [
            (file, raw, "eos_token_id"),
            (beside, generation, "eos_token_id"),
            (file, {ENDS: raw.get(ENDS) or None}, ENDS),  # empty for models without end tokens
        ]
    ]
    ends = [token for _, _, ids in named for token in ids]
    if not raw.get(ENDS):  # otherwise it lists all of them
        ends += tokenizer_end_ids(folder)
    # Some checkpoints name special tokens only in generation_config.json.
    fields = {name: generation[name] for name in ("pad_token_id", "bos_token_id") if _is_id(generation, name)}
    fields |= {**raw, "eos_token_id": next(iter(ends), None)}
    known, config = read_fields(fields, file)
    others = [(file, name, [getattr(config, name)]) for name in ("mask_token_id", "pad_token_id")]
    for place, name, ids in [*named, *others]:
        for token in ids:
            if token is not None and not 0 <= token < config.vocab_size:
                raise CheckpointError(
                    f"{place} has {name}={token}, outside the vocabulary (0 to {config.vocab_size - 1})"
                )
    # A tokenizer may have more tokens than the model; those cannot end a response.
    config.end_token_ids = tuple(dict.fromkeys(token for token in ends if token < config.vocab_size))
    config.eos_token_id = next(iter(config.end_token_ids), None)
    config.attention_pattern = raw.get(PATTERN)
    if config.attention_pattern not in (None, *PATTERNS):
        raise CheckpointError(
            f"{file} has {PATTERN}={config.attention_pattern!r}; known are {', '.join(PATTERNS)}"
        )
    return known, config


def _is_id(fields: dict[str, Any], name: str) -> bool:
    return type(fields.get(name)) is int
