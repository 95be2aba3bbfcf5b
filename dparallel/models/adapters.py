"""Adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.

The names of the adapted modules are ours, or those of the publisher's own modelling code.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from dparallel.models.backbone import DiffusionConfig, DiffusionTransformer
from dparallel.models.formats import FORMATS, NATIVE, publishers
from dparallel.models.hub import checkpoint_folder
from dparallel.models.lora import AdapterError, merge, without_future_warnings
from dparallel.models.names import Names
from dparallel.models.placement import empty_model

__all__ = ["AdapterError", "adapter_folder", "check_adapter", "load_adapter", "merge", "write_adapter"]

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
PREFIX = "base_model.model."
MATRIX = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight")
BASE = ".base_layer.weight"  # PEFT adds a copy of the head where it is adapted
# Settings of PEFT that add or change other things than low-rank updates of matrices, and their only value.
UNSUPPORTED: dict[str, Any] = {
    "bias": "none",
    "lora_bias": False,
    "use_dora": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
}


def adapter_folder(path: str | Path) -> Path:
    """Local folder of an adapter; one on the Hugging Face Hub is downloaded if it is not cached.

    Raises:
        AdapterError: the folder holds no adapter.
        CheckpointError: neither a folder nor a Hub id, or the download fails.
    """
    folder = checkpoint_folder(path)
    inside = folder / "adapter"  # of a training stage
    return inside if not (folder / SETTINGS).is_file() and (inside / SETTINGS).is_file() else folder


def load_adapter(model: DiffusionTransformer, path: str | Path) -> PeftModel:
    """Wrap `model` (in place) with a saved adapter.

    Args:
        path: a folder, or a Hugging Face Hub id. The adapted modules may have the names of the model's
            publisher, as in adapters trained with the publisher's code.

    Raises:
        AdapterError: there is no adapter, it belongs to another architecture or shape, or matrices are
            missing or not finite.
        CheckpointError: neither a folder nor a Hub id, or the download fails.
    """
    folder = adapter_folder(path)
    held, settings, names = _inspect(model, folder)
    if names is FORMATS[NATIVE].names:
        with without_future_warnings():
            return PeftModel.from_pretrained(model, str(folder))
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        tensors = {_renamed(name, names): file.get_tensor(name) for name in held}
    native = _native_settings(settings, names, linear_modules(model))
    native.inference_mode = True
    with without_future_warnings():
        adapted = get_peft_model(model, native)
        set_peft_model_state_dict(adapted, tensors)
    return adapted  # type: ignore[return-value]


def write_adapter(source: str | Path, config: DiffusionConfig, format: str, folder: Path) -> list[str]:
    """Write an adapter in PEFT's layout with the module names of a format; returns the names of the files.

    Args:
        source: folder of an adapter, with our names or those of another format.
        config: of the model that it adapts.
        format: `model_type` of the format, such as `llada`.

    Raises:
        AdapterError: as `load_adapter`.
    """
    model, found, after = empty_model(config), adapter_folder(source), FORMATS[format].names
    held, settings, before = _inspect(model, found)
    modules = linear_modules(model)
    native = _native_settings(settings, before, modules)
    published = _with_modules(native, {name: after.published(name) for name in modules})
    with safe_open(found / WEIGHTS, framework="pt") as file:
        tensors = {
            _renamed(_renamed(name, before), after, back=True): file.get_tensor(name).contiguous()
            for name in held
        }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    targets = _shortest(published.target_modules, [*map(after.published, modules)])
    published.target_modules = targets  # type: ignore[assignment]
    published.inference_mode = True
    published.save_pretrained(str(folder))
    return [SETTINGS, WEIGHTS]


def check_adapter(config: DiffusionConfig, path: str | Path) -> None:
    """Raise the errors of `load_adapter` for a model with this config."""
    _inspect(empty_model(config), adapter_folder(path))


def _inspect(
    model: DiffusionTransformer, folder: Path
) -> tuple[dict[str, tuple[int, ...]], LoraConfig, Names]:
    """Shapes of an adapter's matrices by name, its settings, and its names, checked against the model."""
    held, weights = _shapes(folder), folder / WEIGHTS
    names, modules = _names_of(model, held, weights), dict(model.named_modules())
    for name, shape in held.items():
        _check_tensor(name, names, shape, modules, weights)
    settings = _read_settings(folder)
    tied = [name for name in held if _renamed(name, names).startswith(f"{PREFIX}lm_head.")]
    if tied and model.config.tie_word_embeddings:
        raise AdapterError(
            f"{weights}: {tied[0]} adapts the head, which this model shares with its embedding: merging "
            "would change both; merge it with the publisher's code, and load the merged model"
        )
    _check_complete(held, _expected(model.config, settings, names, folder), weights)
    return held, settings, names


def _shortest(targets: Any, modules: Iterable[str]) -> set[str]:
    """Targets that match the same modules, by the last part of a name where it matches no other module."""
    last = {name: name.rpartition(".")[2] for name in modules}
    ambiguous = {last[name] for name in last if name not in targets}
    return {name if last[name] in ambiguous else last[name] for name in targets}


def linear_modules(model: nn.Module) -> list[str]:
    """Native names of all matrices that an adapter may change."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _read_settings(folder: Path) -> LoraConfig:
    file = folder / SETTINGS
    try:
        settings = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise AdapterError(f"{file} cannot be read: {error}") from error
    if not isinstance(settings, LoraConfig):
        raise AdapterError(f"{file} has peft_type={settings.peft_type!r}; only LORA can be merged")
    for field, only in UNSUPPORTED.items():
        value = getattr(settings, field, only)
        if value not in (only, None, False, [], {}):
            raise AdapterError(
                f"{file} has {field}={value!r}; only adapters that consist of LoRA matrices can be merged: "
                "merge it with the publisher's code, and load the merged model"
            )
    return settings


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the matrices of an adapter by their names in its file, which are all finite."""
    weights = folder / WEIGHTS
    if not weights.is_file():
        if (folder / PICKLED).is_file():
            raise AdapterError(
                f"{folder} has its matrices in {PICKLED}, which may run code and is not read: save it again "
                "as safetensors with a recent version of PEFT"
            )
        raise AdapterError(f"{weights}: no such file; training writes it")
    try:
        with safe_open(weights, framework="pt") as file:
            names = [name for name in sorted(file.keys()) if not name.endswith(BASE)]
            held = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            for name in held:
                if not file.get_tensor(name).isfinite().all():
                    raise AdapterError(f"{weights}: {name} is not finite: the training diverged; train again")
    except SafetensorError as error:
        raise AdapterError(f"{weights} is damaged or cut short: {error}") from error
    return held


def _names_of(model: DiffusionTransformer, held: Iterable[str], weights: Path) -> Names:
    """The names that the adapted modules have in an adapter's file."""
    modules = {*linear_modules(model)}
    adapted = {found[1]: name for name in held if (found := MATRIX.fullmatch(name))}
    known = [FORMATS[NATIVE], *publishers(model.config.family).values()]
    for format in known:
        if all(format.names.native(module) in modules for module in adapted):
            return format.names
    lacking = {
        format: [name for name in adapted if format.names.native(name) not in modules] for format in known
    }
    closest = min(known, key=lambda format: len(lacking[format]))
    raise AdapterError(
        f"{weights} adapts {lacking[closest][0]}, which this model does not have: trained on another "
        "architecture"
    )


def _check_tensor(
    name: str, names: Names, shape: tuple[int, ...], modules: Mapping[str, nn.Module], weights: Path
) -> None:
    """Check the shape of a LoRA matrix: for a linear module (out, in), A is (rank, in), B is (out, rank)."""
    found = MATRIX.fullmatch(name)
    if found is None:
        raise AdapterError(f"{weights}: {name} is no LoRA matrix")
    module = modules[names.native(found[1])]
    assert isinstance(module, nn.Linear)
    expected, actual = (module.in_features, shape[1]) if found[2] == "A" else (module.out_features, shape[0])
    if actual != expected:
        raise AdapterError(
            f"{weights}: {name} has shape {shape}, but {found[1]} maps {module.in_features} to "
            f"{module.out_features} features: trained on a model of another shape"
        )


def _expected(
    config: DiffusionConfig, settings: LoraConfig, names: Names, folder: Path
) -> dict[str, tuple[int, ...]]:
    """Shapes of the matrices of an adapter with these settings, by their names in its file."""
    model = empty_model(config)
    native = _native_settings(settings, names, linear_modules(model))
    try:
        with without_future_warnings():
            adapted = get_peft_model(model, native)
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterError(f"{folder / SETTINGS} fits no model of this shape: {error}") from error
    return {
        _renamed(name, names, back=True): tuple(tensor.shape)
        for name, tensor in get_peft_model_state_dict(adapted, save_embedding_layers=False).items()
    }


def _native_settings(settings: LoraConfig, names: Names, modules: Iterable[str]) -> LoraConfig:
    """The same settings for our modules: what PEFT matches by a module's name in the publisher's code."""
    return _with_modules(settings, {names.published(name): name for name in modules})


def _with_modules(settings: LoraConfig, renamed: Mapping[str, str]) -> LoraConfig:
    """Settings that adapt the same modules under other names.

    Args:
        renamed: new names of all modules by their names, by which `settings` choose.
    """
    ranks, alphas = settings.rank_pattern or {}, settings.alpha_pattern or {}
    chosen = [name for name in renamed if check_target_module_exists(settings, name)]
    return dataclasses.replace(
        settings,
        target_modules=[renamed[name] for name in chosen],
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern=_patterns(ranks, chosen, renamed),
        alpha_pattern=_patterns(alphas, chosen, renamed),
        init_lora_weights=True,  # other initializations compute with the model's weights
    )


def _patterns(values: Mapping[str, int], chosen: Iterable[str], renamed: Mapping[str, str]) -> dict[str, int]:
    """Values by whole names, which PEFT reads as regular expressions."""
    keys = {name: get_pattern_key(list(values), name) for name in chosen}
    return {re.escape(renamed[name]): values[key] for name, key in keys.items() if key in values}


def _renamed(name: str, names: Names, back: bool = False) -> str:
    """The name of a LoRA matrix with the native name of its module; `back` for the inverse."""
    found = MATRIX.fullmatch(name)
    assert found is not None
    module = names.published(found[1]) if back else names.native(found[1])
    return f"{PREFIX}{module}.lora_{found[2]}.weight"


def _check_complete(
    held: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], weights: Path
) -> None:
    missing, surplus = sorted(expected.keys() - held), sorted(held.keys() - expected)
    if missing or surplus:
        raise AdapterError(
            f"{weights} is not what its adapter_config.json describes: missing {missing[:3] or 'nothing'}, "
            f"surplus {surplus[:3] or 'nothing'}: copy both files again, or train the adapter again"
        )
    for name, shape in expected.items():
        if held[name] != shape:
            raise AdapterError(
                f"{weights}: {name} has shape {held[name]}, by its adapter_config.json it should have {shape}"
            )
