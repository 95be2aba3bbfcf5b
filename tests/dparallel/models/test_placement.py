"""Devices and dtypes of models, given by name or object as in transformers."""

from pathlib import Path

import pytest
import torch

from dparallel import load_model
from dparallel.config.base import UserError
from dparallel.models.placement import find_device, find_dtype


def test_a_dtype_is_taken_by_name_or_itself(tiny_checkpoint: Path) -> None:
    for dtype, expected in [
        (None, torch.float32),
        ("auto", torch.float32),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("torch.float16", torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ]:
        assert load_model(tiny_checkpoint, "cpu", dtype).dtype == expected


@pytest.mark.parametrize("dtype", ["fp32", "", torch.int8, "int8", 32, ["float32"]])
def test_an_unknown_dtype_is_refused_with_the_known_ones(tiny_checkpoint: Path, dtype: object) -> None:
    with pytest.raises(UserError, match=r"dtype=.* give one of float32, bfloat16, float16, float64, or auto"):
        load_model(tiny_checkpoint, "cpu", dtype)  # type: ignore[arg-type]


def test_a_device_is_taken_by_name_or_itself(tiny_checkpoint: Path) -> None:
    assert find_device("cpu") == find_device(torch.device("cpu")) == torch.device("cpu")
    assert find_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert load_model(tiny_checkpoint, torch.device("cpu"), "auto").device.type == "cpu"
    assert find_dtype("bfloat16") == torch.bfloat16


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x", "", "mps", "xla", "tpu:0"])
def test_a_device_that_is_not_here_is_refused_with_those_that_are(tiny_checkpoint: Path, device: str) -> None:
    with pytest.raises(UserError, match=f"device='{device}' cannot be used here .*; give one of cpu"):
        load_model(tiny_checkpoint, device)


def test_a_device_without_numbers_says_so(tiny_checkpoint: Path) -> None:
    with pytest.raises(UserError, match="device='meta' has no data"):
        load_model(tiny_checkpoint, "meta")
