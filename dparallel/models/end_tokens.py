"""The tokens that end a response, collected from the files of a checkpoint.

Chat models end a turn with a different token than a text (LLaDA: `<|eot_id|>` and `<|endoftext|>`; Dream:
`<|im_end|>`). These tokens are named in config.json, generation_config.json and the tokenizer's files; any of
them ends a response.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dparallel.models.formats import CheckpointError
from dparallel.models.weights import read_json

# Names of special tokens for the end of a sequence or turn in published tokenizers.
END_NAMES = frozenset(
    {
        "</s>",
        "<EOT>",
        "<end_of_turn>",
        "<eos>",
        "<eot>",
        "<turn|>",
        "<|END_OF_TURN_TOKEN|>",
        "<|end_of_text|>",
        "<|end_of_turn|>",
        "<|endofturn|>",
        "<|endoftext|>",
        "<|end|>",
        "<|eom_id|>",
        "<|eos|>",
        "<|eot_id|>",
        "<|eot|>",
        "<|im_end|>",
        "<|return|>",
        "<|role_end|>",
        "<｜end▁of▁sentence｜>",  # noqa: RUF001
        "[EOS]",
        "[EOT]",
    }
)


def stated_ids(fields: dict[str, Any], name: str, file: object) -> list[int]:
    """Token ids in a field of a JSON file, which holds an id or a list of ids; empty if it is missing."""
    value = fields.get(name)
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    if not ids or any(type(token) is not int for token in ids):  # bool is a subclass of int
        raise CheckpointError(f"{file} has {name}={value!r}, expected int or a list of at least one")
    return ids


def tokenizer_end_ids(folder: Path) -> list[int]:
    """Ids of the tokenizer's end-of-sequence token and of special tokens with names of end tokens.

    Reads only the tokenizer's files; empty for a folder without a tokenizer.
    """
    settings = _read(folder / "tokenizer_config.json")
    added = {
        int(key): token for key, token in _objects(settings.get("added_tokens_decoder")) if key.isdecimal()
    }
    whole: dict[str, Any] = {}
    if not added:  # transformers 5 writes them to tokenizer.json only
        whole = _read(folder / "tokenizer.json")
        listed = [token for token in whole.get("added_tokens") or () if isinstance(token, dict)]
        added = {token["id"]: token for token in listed if isinstance(token.get("id"), int)}
    special = {token.get("content"): token_id for token_id, token in added.items() if token.get("special")}
    named = sorted(token_id for content, token_id in special.items() if content in END_NAMES)
    eos = _content(settings.get("eos_token")) or _content(
        _read(folder / "special_tokens_map.json").get("eos_token")
    )
    if eos is None:
        return named
    first = special[eos] if eos in special else _ordinary_id(folder, eos, whole)
    return list(dict.fromkeys(([] if first is None else [first]) + named))


def _ordinary_id(folder: Path, content: str, whole: dict[str, Any]) -> int | None:
    """Id of a token that is in the regular vocabulary."""
    model = (whole or _read(folder / "tokenizer.json")).get("model")
    vocabularies = [
        _read(folder / "added_tokens.json"),
        model.get("vocab") if isinstance(model, dict) else None,
        _read(folder / "vocab.json"),
    ]
    found = [vocabulary.get(content) for vocabulary in vocabularies if isinstance(vocabulary, dict)]
    return next((token for token in found if type(token) is int), None)


def _content(token: Any) -> str | None:
    """Text of a token, which is stored as a string or as an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _objects(value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        yield from ((key, item) for key, item in value.items() if isinstance(item, dict))


def _read(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
