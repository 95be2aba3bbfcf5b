"""Denoise steps as compiled kernels of fixed shapes, replayed as CUDA graphs on a GPU."""

from typing import Any

import torch
from torch import Tensor

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.canvas import Canvas
from dparallel.decoding.denoise import Outcome, Shape, Workspace, denoise
from dparallel.models.backbone import DiffusionTransformer

SHAPES = 128  # compiled in a process, over all settings and models; steps of further ones run uncompiled


def compiled_denoise(device: torch.device) -> Any:
    """`denoise`, compiled; a first call of each shape takes seconds to a minute."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    step = torch.compile(denoise, dynamic=False)
    return Graphs(step) if device.type == "cuda" else step


class Graphs:
    """Replays each shape's step as one CUDA graph; the state lies at fixed addresses for one decoding.

    The first step of a shape runs as it is, which compiles it; the second is captured. Capturing runs
    nothing, so no step is done twice.
    """

    def __init__(self, step: Any):
        self.step = step
        self.captured: dict[Shape, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Outcome]] = {}
        self.warm: set[Shape] = set()
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(
        self,
        model: DiffusionTransformer,
        canvas: Canvas,
        workspace: Workspace,
        decoding: DecodingConfig,
        shape: Shape,
        rows: Tensor,
        slots: Tensor,
    ) -> Outcome:
        if shape not in self.warm:
            self.warm.add(shape)
            return self.step(model, canvas, workspace, decoding, shape, rows, slots)
        if shape not in self.captured:
            graph = torch.cuda.CUDAGraph()
            rows, slots = rows.clone(), slots.clone()
            with torch.cuda.graph(graph, pool=self.pool):
                outcome = self.step(model, canvas, workspace, decoding, shape, rows, slots)
            self.captured[shape] = graph, rows, slots, outcome
        graph, fixed_rows, fixed_slots, outcome = self.captured[shape]
        fixed_rows.copy_(rows)
        fixed_slots.copy_(slots)
        graph.replay()
        return outcome
