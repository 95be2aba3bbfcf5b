"""The commit rule of a checkpoint: weights fitted for its model, in the file commit_rule.json.

The rule `learned` reads them. They are numbers in JSON: a network of one or more layers with the features
that it takes, and how it was fitted.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, ValidationError, model_validator

from dparallel.config.base import Config, explain
from dparallel.config.decoding import DecodingConfig
from dparallel.models.formats import CheckpointError
from dparallel.models.weights import read_json
from dparallel.rules.declaration import COMMIT_RULE, Weights
from dparallel.rules.features import FEATURES
from dparallel.rules.rules import RULES
from dparallel.stages.files import write_atomically

LARGEST = 1e6  # of a weight; larger ones would overflow in sums


class _Layer(Config):
    weight: tuple[tuple[float, ...], ...]  # (out, in)
    bias: tuple[float, ...]  # (out,)


class _File(Config):
    """Content of the file; what else is in `fitted` is for people."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    features: tuple[str, ...]
    layers: tuple[_Layer, ...]
    fitted: dict[str, Any] = {}

    @model_validator(mode="after")
    def _fits_together(self) -> "_File":
        if self.features != FEATURES:
            raise ValueError(f"features={list(self.features)}, and this version has {list(FEATURES)}")
        width = len(self.features)
        for place, layer in enumerate(self.layers):
            if (
                not layer.weight
                or len(layer.weight) != len(layer.bias)
                or {*map(len, layer.weight)} != {width}
            ):
                raise ValueError(f"layer {place} does not have {width} inputs and as many rows as biases")
            width = len(layer.bias)
            numbers = [*layer.bias, *(number for row in layer.weight for number in row)]
            if not all(math.isfinite(number) and abs(number) <= LARGEST for number in numbers):
                raise ValueError(f"layer {place} has a weight beyond {LARGEST:g}")
        if width != 1 or not self.layers:
            raise ValueError("the last layer does not have one output")
        return self


@dataclass(frozen=True, eq=False)
class CommitRule:
    """A fitted commit rule.

    Attributes:
        weights: on the CPU.
        fitted: how it was fitted, as JSON values.
    """

    weights: Weights
    fitted: Mapping[str, Any] = field(default_factory=dict)
    _there: dict[torch.device, Weights] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> Weights:
        """The weights on a device, copied there once."""
        if device not in self._there:
            layers = tuple((weight.to(device), bias.to(device)) for weight, bias in self.weights.layers)
            self._there[device] = Weights(layers)
        return self._there[device]

    def __deepcopy__(self, memo: dict[int, Any]) -> "CommitRule":
        return CommitRule(self.weights, self.fitted)

    def as_json(self) -> str:
        """The content of the file."""
        layers = [{"weight": weight.tolist(), "bias": bias.tolist()} for weight, bias in self.weights.layers]
        return (
            json.dumps({"features": FEATURES, "layers": layers, "fitted": dict(self.fitted)}, indent=1) + "\n"
        )


def read_commit_rule(folder: Path) -> CommitRule | None:
    """The commit rule of a checkpoint; None if it has none.

    Raises:
        CheckpointError: the file is damaged, or fitted by another version.
    """
    file = folder / COMMIT_RULE
    if not file.is_file():
        return None
    try:
        found = _File.model_validate(read_json(file))
    except ValidationError as error:
        raise CheckpointError(
            f"{file} is damaged or was fitted by another version of dparallel ({explain(error)}): delete it, "
            "or fit the rule again with `dparallel fit-rule`"
        ) from error
    layers = tuple(
        (torch.tensor(layer.weight, dtype=torch.float64), torch.tensor(layer.bias, dtype=torch.float64))
        for layer in found.layers
    )
    return CommitRule(Weights(layers), found.fitted)


def write_commit_rule(folder: Path, rule: CommitRule) -> None:
    """Write the commit rule of a checkpoint."""
    write_atomically(folder / COMMIT_RULE, rule.as_json())


def check_commit_rule(
    decoding: DecodingConfig, rule: CommitRule | None, where: str = "whose checkpoint"
) -> None:
    """Raise a CheckpointError if a decoding needs a commit rule that the model lacks.

    Args:
        where: words about the model, up to "holds no commit_rule.json".
    """
    if RULES[decoding.rule].needs_weights and rule is None:
        raise CheckpointError(
            f"rule={decoding.rule!r} with a model {where} holds no {COMMIT_RULE}: fit one on recorded "
            "trajectories with `dparallel fit-rule` (for students of an experiment, by merging.commit_rule), "
            "or use a rule that needs none, such as 'entropy'"
        )
