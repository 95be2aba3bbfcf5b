"""LoRA adapters with PEFT: attach, load, merge. Target names that do not match in every layer are errors."""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dparallel.config.base import UserError
from dparallel.config.experiment import LoraSettings
from dparallel.models.backbone import DiffusionConfig, DiffusionTransformer
from dparallel.models.placement import empty_model


class AdapterError(UserError):
    """An adapter does not fit its model; the message names the module and what would fit."""


def attach(model: DiffusionTransformer, settings: LoraSettings) -> PeftModel:
    """Wrap `model` (in place) with a new adapter, whose weights are the only trainable ones.

    The new adapter does not change the model's output.

    Raises:
        AdapterError: a target does not match a linear module in every layer.
    """
    check_targets(model, settings.targets)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
        bias="none",
    )
    with _without_future_warnings():
        return get_peft_model(model, config)


def check_targets(model: DiffusionTransformer, targets: Iterable[str]) -> None:
    """Raise AdapterError if a target does not match in every layer; PEFT accepts partial matches silently."""
    layers_of: dict[str, set[int]] = {}  # module name within a layer -> layers that have it
    for name, module in model.named_modules():
        found = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if found and isinstance(module, nn.Linear):
            layers_of.setdefault(found[2], set()).add(int(found[1]))
    count = model.config.num_hidden_layers
    for target in targets:
        matched: set[int] = set()
        for name, layers in layers_of.items():
            if name == target or name.endswith("." + target):
                matched |= layers
        if len(matched) != count:
            known = ", ".join(sorted(name.rpartition(".")[2] for name in layers_of))
            raise AdapterError(
                f"LoRA target {target!r} matches in {len(matched)} of {count} layers; known modules: {known}"
            )


def load_adapter(model: DiffusionTransformer, folder: str | Path) -> PeftModel:
    """Wrap `model` (in place) with a saved adapter.

    Raises:
        AdapterError: there is no adapter, it belongs to another architecture or shape, or matrices are
            missing or not finite.
    """
    weights = Path(folder) / "adapter_model.safetensors"
    if not weights.is_file():
        raise AdapterError(f"{weights}: no such file; training writes it")
    modules = dict(model.named_modules())
    try:
        with safe_open(weights, framework="pt") as file:
            held = {name: tuple(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
            for name in held:
                if not file.get_tensor(name).isfinite().all():
                    raise AdapterError(f"{weights}: {name} is not finite: the training diverged; train again")
    except SafetensorError as error:
        raise AdapterError(f"{weights} is damaged or cut short: {error}") from error
    for name, shape in held.items():
        _check_tensor(name, shape, modules, weights)
    _check_complete(held, _expected(model.config, Path(folder)), weights)
    with _without_future_warnings():
        return PeftModel.from_pretrained(model, str(folder))


def _expected(config: DiffusionConfig, folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the matrices of an adapter with the settings in `folder`, by their names in its file."""
    try:
        settings = LoraConfig.from_pretrained(str(folder))
        settings.init_lora_weights = True  # other initializations compute with the model's weights
        with _without_future_warnings():
            adapted = get_peft_model(empty_model(config), settings)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise AdapterError(
            f"{folder / 'adapter_config.json'} fits no model of this shape: {error}"
        ) from error
    return {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(adapted).items()}


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


@contextmanager
def _without_future_warnings() -> Iterator[None]:
    """Silence PEFT's use of an attribute deprecated by transformers, which users cannot change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _check_tensor(name: str, shape: tuple[int, ...], modules: dict[str, nn.Module], weights: Path) -> None:
    """Check the shape of a LoRA matrix: for a linear module (out, in), A is (rank, in), B is (out, rank)."""
    found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
    if found is None:
        raise AdapterError(f"{weights}: {name} is no LoRA matrix")
    module = modules.get(found[1])
    if not isinstance(module, nn.Linear):
        raise AdapterError(
            f"{weights} adapts {found[1]}, which this model does not have: trained on another architecture"
        )
    expected, actual = (module.in_features, shape[1]) if found[2] == "A" else (module.out_features, shape[0])
    if actual != expected:
        raise AdapterError(
            f"{weights}: {name} has shape {shape}, but {found[1]} maps {module.in_features} to "
            f"{module.out_features} features: trained on a model of another shape"
        )


def detach(student: PeftModel) -> tuple[DiffusionTransformer, dict[nn.Parameter, Linear]]:
    """Remove the adapter (in place); returns the plain model and the adapter of each of its matrices.

    Raises:
        AdapterError: the adapter contains values that are not finite.
    """
    for name, weight in student.named_parameters():
        if "lora_" in name and not weight.isfinite().all():
            raise AdapterError(f"{name} is not finite: its training diverged")
    adapters = [module for module in student.modules() if isinstance(module, Linear)]
    return student.unload(), {adapter.get_base_layer().weight: adapter for adapter in adapters}  # type: ignore[misc]


def merged_weight(weight: Tensor, adapter: Linear) -> Tensor:
    """Sum of a matrix and its adapter's update, in float32."""
    [name] = adapter.active_adapters
    return weight.float().add(adapter.get_delta_weight(name))


def merge(student: PeftModel) -> DiffusionTransformer:
    """Merge the adapter into the base weights (in place) and return the plain model.

    Each sum is computed in float32 and rounded to the dtype of the matrix.

    Raises:
        AdapterError: the adapter contains values that are not finite.
    """
    model, adapters = detach(student)
    fold(adapters)
    return model


@torch.no_grad()
def fold(adapters: Mapping[nn.Parameter, Linear]) -> None:
    """Replace each base matrix (in place) by its merged matrix, in the base's dtype."""
    for weight, adapter in adapters.items():
        weight.data = merged_weight(weight, adapter).to(weight.dtype)
