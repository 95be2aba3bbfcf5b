"""Denoise steps as compiled kernels with fixed shapes, replayed as CUDA graphs on a GPU.

The last graphs of a model are kept with the memory that they use, for the next call with the same settings,
batch size and length of canvases (in steps of 64 positions). Any other call replaces them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.denoise import Inputs, Outcome, Shape, Workspace, denoise
from dparallel.decoding.transfer import each_of
from dparallel.models.backbone import DiffusionTransformer

SHAPES = 128  # limit of compiled shapes per process, over all settings and models; others run uncompiled


class Kept(NamedTuple):
    """A compiled step and its workspace, for calls whose `key` is the same."""

    key: Any
    commit_rule: Any  # the model's, whose weights are in the workspace
    workspace: Workspace
    step: Any


_kept: WeakKeyDictionary[DiffusionTransformer, Kept] = WeakKeyDictionary()


@contextmanager
def prepared(
    model: DiffusionTransformer, decoding: DecodingConfig, slots: int, length: int
) -> Iterator[tuple[Workspace, Any]]:
    """The workspace of a decoding with `slots` rows of canvases with `length` positions, and its step."""
    if not decoding.compile:
        yield Workspace.allocate(model, decoding, slots, length), denoise
        return
    key = decoding.model_copy(update={"seed": None}), slots, length, _addresses(model)
    kept = _kept.pop(model, None)  # no other call uses it meanwhile
    if kept is None or kept.key != key or kept.commit_rule is not model.commit_rule:
        del kept
        workspace = Workspace.allocate(model, decoding, slots, length)
        kept = Kept(key, model.commit_rule, workspace, compiled_denoise(model.device))
    yield kept.workspace, kept.step
    if _is_plain(model):
        _kept[model] = kept


def kept_bytes(model: DiffusionTransformer) -> int:
    """Bytes of the workspace kept for a model, which its next call reuses or frees."""
    kept = _kept.get(model)
    return 0 if kept is None else kept.workspace.bytes


def _addresses(model: DiffusionTransformer) -> tuple[int, ...]:
    """What captured graphs read; weights may change in place, but not move."""
    return tuple(weight.data_ptr() for weight in model.parameters())


def _is_plain(model: DiffusionTransformer) -> bool:
    """Whether a model computes the same in every call; adapters may be switched off."""
    own = DiffusionTransformer.__module__
    return all(
        type(module).__module__ == own or type(module).__module__.startswith("torch.nn.")
        for module in model.modules()
    )


def compiled_denoise(device: torch.device) -> Any:
    """`denoise`, compiled; the first call with a shape takes seconds up to a minute."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    step = torch.compile(denoise, dynamic=False)
    return Graphs(step) if device.type == "cuda" else step


class Graphs:
    """Replays the step of each shape as a CUDA graph, with inputs at fixed addresses.

    The first step of a shape runs normally, which compiles it; the second one is captured. Capturing does
    not execute anything, so no step runs twice.
    """

    def __init__(self, step: Any):
        self.step = step
        self.captured: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], Outcome[Tensor]]] = {}
        self.warm: set[Any] = set()
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(
        self,
        model: DiffusionTransformer,
        workspace: Workspace,
        decoding: DecodingConfig,
        shape: Shape,
        inputs: Inputs[Tensor],
    ) -> Outcome[Tensor]:
        key = shape, tuple(None if given is None else tuple(given.shape) for given in inputs)
        if key not in self.warm:
            self.warm.add(key)
            return self.step(model, workspace, decoding, shape, inputs)
        given = [tensor for tensor in inputs if tensor is not None]
        if key not in self.captured:
            graph = torch.cuda.CUDAGraph()
            fixed = each_of(inputs, Tensor.clone)
            with torch.cuda.graph(graph, pool=self.pool):
                outcome = self.step(model, workspace, decoding, shape, fixed)
            self.captured[key] = graph, [tensor for tensor in fixed if tensor is not None], outcome
        graph, addresses, outcome = self.captured[key]
        torch._foreach_copy_(addresses, given)
        graph.replay()
        return outcome
