"""LoRA adapters with PEFT: attach and merge. Target names that do not match in every layer are errors."""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from torch import Tensor, nn

from dparallel.config.base import UserError
from dparallel.config.experiment import LoraSettings
from dparallel.models.backbone import DiffusionTransformer


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
    with without_future_warnings():
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


@contextmanager
def without_future_warnings() -> Iterator[None]:
    """Silence PEFT's use of an attribute deprecated by transformers, which users cannot change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


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
