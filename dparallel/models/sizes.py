"""Sizes of checkpoints, determined from file names and headers."""

from pathlib import Path

import torch

from dparallel.models import weights
from dparallel.models.checkpoints import read_config
from dparallel.models.hub import checkpoint_folder
from dparallel.models.placement import empty_model


def stored_bytes(path: str | Path) -> int:
    """Bytes of a checkpoint's stored weights.

    For a model on the Hub without local weights: from its index, or else from the config's dtype (bf16 if not
    stated).
    """
    folder = checkpoint_folder(path, with_weights=False)
    if weights.are_here(folder):
        return sum(file.stat().st_size for file in {tensor.file for tensor in weights.locate(folder)})
    index = folder / weights.INDEX
    stated = weights.read_json(index).get("metadata") if index.is_file() else None
    if isinstance(stated, dict) and isinstance(stated.get("total_size"), int):
        return stated["total_size"]
    config = read_config(folder)
    model = empty_model(config)
    dtype = getattr(config, "dtype", None) or torch.bfloat16
    return dtype.itemsize * sum(weight.numel() for weight in model.parameters())


def parameters_of(path: str | Path) -> int:
    """Number of parameters of a checkpoint, by its config."""
    return sum(weight.numel() for weight in empty_model(read_config(path)).parameters())
