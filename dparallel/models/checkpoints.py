"""Load and save checkpoints, in dparallel's own format or in that of the model's publisher."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)
from transformers.utils import logging as transformers_logging

from dparallel.config.base import UserError
from dparallel.models import weights
from dparallel.models.backbone import DiffusionConfig, DiffusionTransformer
from dparallel.models.commit_rule import read_commit_rule, write_commit_rule
from dparallel.models.config_file import PATTERN, read_config_file
from dparallel.models.defaults import Defaults, read_defaults, write_defaults
from dparallel.models.formats import FORMATS, NATIVE, CheckpointError, is_computed
from dparallel.models.hub import checkpoint_folder
from dparallel.models.placement import empty_model, find_device, find_dtype, name_accelerator
from dparallel.models.weights import Stored, read_json
from dparallel.rules.declaration import COMMIT_RULE
from dparallel.stages.files import SAVING, give_usual_modes, naming_the_file, saving_folder, write_atomically
from dparallel.stages.manifest import CLAIM, MANIFEST

__all__ = [
    "CheckpointError",
    "checkpoint_folder",
    "choose_format",
    "load_model",
    "load_tokenizer",
    "read_config",
    "save_model",
]

# Registers the native format with transformers' auto classes. Saved models also contain backbone.py, so that
# trust_remote_code=True loads them where this package is not installed.
AutoConfig.register("dparallel", DiffusionConfig)
AutoModel.register(DiffusionConfig, DiffusionTransformer)
DiffusionConfig.register_for_auto_class()
DiffusionTransformer.register_for_auto_class("AutoModel")

WRITABLE = ("native", "original")
DTYPES = ("BF16", "F16", "F32", "F64")  # dtypes of usable tensors, by their names in safetensors
# Files of a published checkpoint that are copied along: tokenizer, model code, licence.
COMPANIONS = (
    "*.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "*.model",
    "*.tiktoken",
    "vocab.*",
    "*.txt",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)
# Not copied: files that list the weight files, and files that this project adds to a model.
NO_COMPANIONS = ("config.json", "*.index.json", COMMIT_RULE, CLAIM, MANIFEST)
# Tokenizer classes that AutoTokenizer cannot find, or only with a warning about the model type.
TOKENIZERS: dict[str | None, Any] = {
    "DreamTokenizer": Qwen2Tokenizer,  # its remote code is a copy of this class
    "PreTrainedTokenizerFast": PreTrainedTokenizerFast,
}


def load_model(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    adapter: str | Path | None = None,
) -> DiffusionTransformer:
    """Load a masked diffusion model for inference, without running code of the checkpoint.

    Tensors are moved to the device one at a time. On a CPU, tensors that keep their dtype remain in the
    (privately mapped) files, so that no second copy is made. `defaults` of the model are the decode defaults
    of the checkpoint: `model.defaults.decoding(threshold=0.3)` is a `DecodingConfig` with another threshold.

    Args:
        path: a folder, or a Hugging Face Hub id (`owner/name`, `owner/name@revision`).
        device: such as "cpu" or "cuda:1"; by default a GPU if there is one.
        dtype: such as "bfloat16" or torch.bfloat16. None and "auto" keep the dtypes of the checkpoint, in
            which norms may have a different dtype than matrices.
        adapter: a LoRA adapter that is merged into the model: a folder or a Hub id in PEFT's layout, with our
            module names or those of the model's publisher.

    Raises:
        AdapterError: the adapter does not exist, is damaged, or was trained on another architecture.
        CheckpointError: the checkpoint does not exist, has another architecture, files that are missing,
            unreadable or damaged, or tensors that are missing, unexpected or of the wrong shape. Raised
            before any tensor is read.
        UserError: the device is not available, or the dtype is unknown.
    """
    device, dtype = find_device(device), find_dtype(dtype)
    folder = checkpoint_folder(path)
    config, stored = _inspect(folder)
    defaults, commit_rule = read_defaults(folder), read_commit_rule(folder)
    if dtype is None:
        _check_one_dtype(stored)
    if config.tie_word_embeddings:
        _untie(folder, stored)
    tensors = weights.read(stored, device, dtype)
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["embedding.weight"]
    model = empty_model(config)
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie_weights()
    model.config.name_or_path = str(folder.resolve())  # save_model finds the remaining files there
    model.defaults, model.commit_rule = defaults, commit_rule
    if adapter is not None:
        from dparallel.models import adapters  # here, since PEFT takes seconds to import

        model = adapters.merge(adapters.load_adapter(model, adapter))
        model.defaults, model.commit_rule = Defaults(), None  # those of the base model do not suit it
    return model.eval()


def read_config(path: str | Path) -> DiffusionConfig:
    """Read the model's shape and special tokens.

    Does not download the weights of a model on the Hub; weight files that exist locally are checked.

    Raises:
        CheckpointError: as `load_model`.
    """
    folder = checkpoint_folder(path, with_weights=False)
    if os.path.isdir(os.path.expanduser(path)) or weights.are_here(folder):
        return _inspect(folder)[0]
    return read_config_file(folder)[1]


def save_model(
    model: DiffusionTransformer,
    path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    format: str = "native",
) -> list[str]:
    """Save `model` in a format that `load_model` and the model's ecosystem load.

    Decode defaults and commit rule of the model are saved with it.

    Args:
        path: folder, created if needed.
        tokenizer: saved with a model in `native` format; in `original` format the tokenizer is copied.
        format: `native` is dparallel's format, which plain `transformers` loads. `original` is the format of
            the checkpoint from which `model` was loaded, which must still exist: its tensor names, files,
            config fields, tokenizer and model code.

    Returns:
        Sorted names of the files written.

    Raises:
        CheckpointError: `original` for a model not loaded from a published checkpoint, not enough disk
            space, or a folder that contains weight files that would not be overwritten.
        FileError: the folder cannot be made or written.
        UserError: unknown format.
    """
    if format not in WRITABLE:
        raise UserError(f"format={format!r} cannot be written; formats that can: {', '.join(WRITABLE)}")
    source = _published_source(model) if format == "original" else None
    folder = Path(os.path.expanduser(path))
    with naming_the_file(folder):
        return _save(model, folder, source, tokenizer)


def _save(
    model: DiffusionTransformer, folder: Path, source: Path | None, tokenizer: PreTrainedTokenizerBase | None
) -> list[str]:
    """Write all files beside their places, then move them there; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    check_disk(model, folder)
    for leftover in folder.glob(f"{SAVING}*"):  # from an interrupted save
        shutil.rmtree(leftover)
    with saving_folder(folder) as partial:
        if source is None:
            _write_native(model, tokenizer, partial)
        else:
            _write_original(model, source, partial)
        defaults = model.defaults or Defaults()
        if read_defaults(partial).settings != defaults.settings:
            write_defaults(partial, defaults.settings, defaults.chosen)
        if model.commit_rule is not None:
            write_commit_rule(partial, model.commit_rule)
        files = [file for file in partial.rglob("*") if file.is_file()]
        give_usual_modes(files)
        names = sorted(file.relative_to(partial).as_posix() for file in files)
        if stale := sorted({file.name for file in folder.glob("model*.safetensors*")}.difference(names)):
            raise CheckpointError(
                f"{folder} already holds {stale[0]} of another checkpoint: save into an empty folder"
            )
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(partial / name, folder / name)
    return names


def choose_format(choice: str, source: str | Path) -> str:
    """The format, `native` or `original`, for a model made from the checkpoint `source`.

    Args:
        choice: `native`, `original`, or `auto` for the format of `source`.

    Raises:
        CheckpointError: `original`, but `source` is in native format.
    """
    folder = checkpoint_folder(source, with_weights=False)
    native = read_config_file(folder)[0] is FORMATS[NATIVE]
    if choice == "original" and native:
        raise CheckpointError(_no_original(f"comes from {folder}, which is in our own format"))
    return choice if choice != "auto" else "native" if native else "original"


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer from a folder or the Hub, without running code of the checkpoint.

    Raises:
        CheckpointError: there is no usable tokenizer, or its mask token differs from the model's.
    """
    folder = checkpoint_folder(path, with_weights=False)
    mask_token_id = read_config_file(folder)[1].mask_token_id
    settings = folder / "tokenizer_config.json"
    named = read_json(settings).get("tokenizer_class") if settings.is_file() else None
    if not isinstance(named, str | None):
        raise CheckpointError(f"{settings} has tokenizer_class={named!r}, expected a name")
    try:
        tokenizer = TOKENIZERS.get(named, AutoTokenizer).from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions for files it cannot read
        raise CheckpointError(
            f"{folder} has no tokenizer that transformers can load: {error}: check its files and "
            "their permissions"
        ) from error
    if mask_token_id not in tokenizer.get_vocab().values():
        raise CheckpointError(
            f"the tokenizer in {folder} has no token {mask_token_id}, config.json's mask_token_id "
            f"({len(tokenizer)} tokens): it belongs to another model"
        )
    if tokenizer.mask_token_id not in (None, mask_token_id):
        raise CheckpointError(
            f"the tokenizer in {folder} has mask token {tokenizer.mask_token_id}, config.json has "
            f"mask_token_id={mask_token_id}: correct the wrong one"
        )
    added = tokenizer.added_tokens_decoder.get(mask_token_id)
    if tokenizer.mask_token_id is None and not (added and added.special):
        token = tokenizer.convert_ids_to_tokens(mask_token_id)
        raise CheckpointError(
            f"the tokenizer in {folder} has the ordinary token {token!r} at {mask_token_id}, config.json's "
            "mask_token_id, which must be a special one: it belongs to another model"
        )
    return tokenizer


def _inspect(folder: Path) -> tuple[DiffusionConfig, dict[str, Stored]]:
    """Config and tensors (by native names) of a folder, checked without reading tensors."""
    known, config = read_config_file(folder)
    held = [tensor for tensor in weights.locate(folder) if not is_computed(tensor.name)]
    for tensor in held:
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name} is stored as {tensor.dtype}; only {', '.join(DTYPES)} "
                "are supported: use the checkpoint that is not quantized"
            )
    stored = {known.names.native(tensor.name): tensor for tensor in held}
    _check_tensors(folder, empty_model(config), stored)
    return config, stored


def _check_tensors(folder: Path, model: DiffusionTransformer, stored: dict[str, Stored]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings and "lm_head.weight" not in stored:
        del expected["lm_head.weight"]
    missing, surplus = sorted(expected.keys() - stored), sorted(stored.keys() - expected)
    if missing or surplus:
        raise CheckpointError(
            f"{folder} is a checkpoint of another architecture: missing {missing[:3] or 'nothing'}, "
            f"surplus {surplus[:3] or 'nothing'}"
        )
    for name, shape in expected.items():
        found = stored[name]
        if found.shape != shape:
            raise CheckpointError(
                f"{found.file}: tensor {found.name} has shape {found.shape}, config.json says {shape}"
            )


def _check_one_dtype(stored: dict[str, Stored]) -> None:
    """Check that all matrices have one dtype; norms may have another."""
    found = {tensor.dtype: tensor for name, tensor in stored.items() if not name.endswith("norm.weight")}
    if len(found) > 1:
        (dtype, one), (other_dtype, other) = list(found.items())[:2]
        raise CheckpointError(
            f"{one.file} stores {one.name} as {dtype}, {other.file.name} stores {other.name} as "
            f"{other_dtype}: say which dtype to load all in, or save it once in one dtype"
        )


def _untie(folder: Path, stored: dict[str, Stored]) -> None:
    """For a tied head, drop a stored copy of the embedding; a head that differs is an error."""
    if "lm_head.weight" not in stored:
        return
    pair = {name: stored[name] for name in ("embedding.weight", "lm_head.weight")}
    embedding, head = weights.read(pair, "cpu", None).values()
    if not torch.equal(embedding, head):
        raise CheckpointError(
            f"{folder}/config.json ties the head to the embedding, but the weights hold a head that differs: "
            "set weight_tying (LLaDA) or tie_word_embeddings to false"
        )
    del stored["lm_head.weight"]


def check_disk(model: DiffusionTransformer, folder: Path) -> None:
    """Raise a CheckpointError if the model does not fit on the disk of `folder`."""
    needed = sum(parameter.nbytes for parameter in model.parameters())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"the model needs {needed / 1e9:.3g} GB on the disk of {folder}, which has {free / 1e9:.3g} GB "
            "free: make room or choose another folder"
        )


def _published_source(model: DiffusionTransformer) -> Path:
    if not model.config.name_or_path:
        raise CheckpointError(_no_original("was not loaded from a checkpoint"))
    choose_format("original", model.config.name_or_path)
    return checkpoint_folder(model.config.name_or_path)


def _no_original(reason: str) -> str:
    return (
        "format='original' writes the names and files of the published checkpoint a model was loaded from; "
        f"this one {reason}: load the published one, or give format='native'"
    )


def _write_native(
    model: DiffusionTransformer, tokenizer: PreTrainedTokenizerBase | None, folder: Path
) -> None:
    transformers_logging.disable_progress_bar()
    name_accelerator()
    model.save_pretrained(folder)
    transformers_logging.enable_progress_bar()
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        name_as_before(folder / "tokenizer_config.json")


def name_as_before(settings: Path) -> None:
    """Write a tokenizer's class and special tokens as transformers 4 expects; transformers 5 reads both."""
    fields = read_json(settings)
    for name in ("backend", "is_local", "local_files_only"):
        fields.pop(name, None)
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    write_atomically(settings, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")


def _write_original(model: DiffusionTransformer, source: Path, folder: Path) -> None:
    known, config = read_config_file(source)
    tensors = model.state_dict()
    if config.tie_word_embeddings:  # the source's files may contain both matrices
        tensors["lm_head.weight"] = tensors["embedding.weight"].clone()
    before = weights.locate(source)
    names = [tensor.name for tensor in before if not is_computed(tensor.name)]
    weights.write_like(source, {name: tensors[known.names.native(name)] for name in names}, folder)

    shutil.copyfile(source / "config.json", folder / "config.json")
    if config.attention_pattern != model.config.attention_pattern:
        raw: dict[str, Any] = {**read_json(source / "config.json"), PATTERN: model.config.attention_pattern}
        (folder / "config.json").write_text(
            json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    if [tensor.dtype for tensor in before] != [tensor.dtype for tensor in weights.locate(folder)]:
        raw = read_json(folder / "config.json")
        for field in ("torch_dtype", "dtype"):
            if raw.get(field):
                raw[field] = str(model.dtype).removeprefix("torch.")
        (folder / "config.json").write_text(
            json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    for file in sorted({file for pattern in COMPANIONS for file in source.glob(pattern)}):
        name = file.relative_to(source)
        if file.is_file() and not any(name.match(pattern) for pattern in NO_COMPANIONS):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / name)
