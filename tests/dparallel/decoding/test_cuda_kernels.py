"""Decoding uses no operation that CUDA has no kernel for; this is tested without a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dparallel import generate
from tests.dparallel.decoding.test_against_oracle import MODELS, RULES, decodings, prompts


class CudaKernels(TorchDispatchMode):
    """Refuses, on any device, operations of bool tensors that have no CUDA kernel."""

    LACKING = ("scatter_reduce", "scatter_add", "topk", "kthvalue", "mode", "cumprod", "histc", "bincount")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0].rstrip("_")
        if name in self.LACKING:
            assert not any(isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in args), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=4)  # all rules together meet every mode and cache
@given(st.data(), prompts, st.sampled_from(MODELS))
def test_every_operation_has_a_cuda_kernel(rule, data, prompts, model):
    with CudaKernels():
        generate(model, prompts, data.draw(decodings(rule)), batch_size=3)
