"""Denoise steps as compiled kernels with fixed shapes, replayed as CUDA graphs on a GPU."""

from typing import Any

import torch
from torch import Tensor

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.canvas import Canvas
from dparallel.decoding.denoise import Outcome, Shape, Workspace, denoise
from dparallel.models.backbone import DiffusionTransformer

SHAPES = 128  # limit of compiled shapes per process, over all settings and models; others run uncompiled


def compiled_denoise(device: torch.device) -> Any:
    """`denoise`, compiled; the first call with a shape takes seconds up to a minute."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    step = torch.compile(denoise, dynamic=False)
    return Graphs(step) if device.type == "cuda" else step


class Graphs:
    """Replays the step of each shape as a CUDA graph; the state has fixed addresses during a decoding.

    The first step of a shape runs normally, which compiles it; the second one is captured. Capturing does
    not execute anything, so no step runs twice.
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
