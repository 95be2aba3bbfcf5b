"""NF4 (4-bit) quantization of the base model's linear layers for adapter training."""

import torch
from torch import nn

from dparallel.config.base import ConfigError
from dparallel.models.backbone import DiffusionTransformer

BLOCK = 64  # weights per scale


def quantize(model: DiffusionTransformer, device: torch.device) -> None:
    """Move `model` (in place) to `device` with all layers' matrices as NF4 with double quantization.

    Embedding, norms and head keep their dtype, which is also the compute dtype of the 4-bit matrices.
    Matrices are converted one at a time, so that the device never holds the full-precision weights. Needs
    bitsandbytes.

    Raises:
        ConfigError: the rows of a matrix are not divisible into blocks, which CPUs dequantize incorrectly.
    """
    check_blocks(model)
    found = {name: module for name, module in model.layers.named_modules() if isinstance(module, nn.Linear)}
    for name, linear in found.items():
        model.layers.set_submodule(name, _four_bits(linear, device))
    model.to(device)  # type: ignore[arg-type]


def check_blocks(model: DiffusionTransformer) -> None:
    """Raise a ConfigError for a matrix whose rows are not divisible into blocks; needs no weights."""
    for name, module in model.layers.named_modules():
        if isinstance(module, nn.Linear) and module.in_features % BLOCK:
            raise ConfigError(
                f"training.quantization=nf4: layers.{name} has {module.in_features} inputs, no multiple of "
                f"{BLOCK}: leave training.quantization out for this model"
            )


def whole_blocks(model: DiffusionTransformer) -> bool:
    """Whether the rows of all matrices are divisible into blocks."""
    linears = (module for module in model.layers.modules() if isinstance(module, nn.Linear))
    return not any(linear.in_features % BLOCK for linear in linears)


def _four_bits(linear: nn.Linear, device: torch.device) -> nn.Module:
    import bitsandbytes

    made = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=linear.weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    made.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data, requires_grad=False, quant_type="nf4", blocksize=BLOCK
    )
    made.bias = linear.bias
    return made.to(device)
