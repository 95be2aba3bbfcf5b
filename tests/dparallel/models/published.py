"""Checkpoints as published, with shards, code, tokenizer and extra fields."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from tests.conftest import GOLDEN

ABSENT = object()
INDEX = "model.safetensors.index.json"
SPECIAL = {253: "<|pad|>", 254: "<|eos|>", 255: "<|mask|>"}
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]  # those that stand for themselves
CODE = "raise RuntimeError('a checkpoint may not run its own code')\n"
EXTRAS = {  # fields of the published config.json that this package does not read
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.2",
    "use_cache": False,
    "a_field_of_tomorrow": {"nested": [1, None, "ü"]},
}


def publish(folder: Path, family: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """`llada` or `dream`: the golden weights in `dtype`, in three shards that split layers apart."""
    golden = GOLDEN / f"{family}_tiny"
    folder.mkdir(parents=True)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(golden / "model.safetensors").items()}
    weight_map = {
        name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))
    }
    for file in set(weight_map.values()):
        shard = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(shard, folder / file, metadata={"format": "pt"})
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    config = {**json.loads((golden / "config.json").read_text(encoding="utf-8")), **EXTRAS}
    config["auto_map"] = {
        "AutoConfig": f"configuration_{family}.Config",
        "AutoModel": f"modeling_{family}.Model",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in (f"configuration_{family}.py", f"modeling_{family}.py", "generation_utils.py"):
        (folder / name).write_text(CODE, encoding="utf-8")
    {"llada": _llada_tokenizer, "dream": _dream_tokenizer}[family](folder)
    (folder / "README.md").write_text(
        "The publishers' model card says nothing of what was made of the model.", encoding="utf-8"
    )
    return folder


def _llada_tokenizer(folder: Path) -> None:
    vocabulary = {SPECIAL.get(index, f"w{index}"): index for index in range(256)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _dream_tokenizer(folder: Path) -> None:
    """Like Dream's: no tokenizer.json, and its own class, a copy of Qwen2's."""
    pieces = [*map(chr, BYTES), "Ġ", "hi"]
    pieces += [f"w{index}" for index in range(253 - len(pieces))]  # added tokens follow without a gap
    (folder / "vocab.json").write_text(
        json.dumps({piece: index for index, piece in enumerate(pieces)}), encoding="utf-8"
    )
    (folder / "merges.txt").write_text("#version: 0.2\nh i\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": {
            str(index): {"content": content, "special": True} for index, content in SPECIAL.items()
        },
        "unk_token": "<|pad|>",
        "pad_token": "<|pad|>",
        "eos_token": "<|eos|>",
        "mask_token": "<|mask|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "tokenization_dream.py").write_text(CODE, encoding="utf-8")
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 254, "bos_token_id": 254}), encoding="utf-8"
    )


def edit_json(file: Path, **fields: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


def edited(checkpoint: Path, folder: Path, **fields: object) -> Path:
    """A copy of a checkpoint in `folder` with other fields in its config.json, or without (ABSENT)."""
    copy = shutil.copytree(checkpoint, folder / "edited")
    config = {**json.loads((copy / "config.json").read_text(encoding="utf-8")), **fields}
    kept = {field: value for field, value in config.items() if value is not ABSENT}
    (copy / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    return copy


def edited_llada(folder: Path, **fields: object) -> Path:
    """As `edited`, of a small LLaDA."""
    return edited(GOLDEN / "llada_tiny", folder, **fields)
