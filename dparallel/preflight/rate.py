"""Measure the teacher's throughput on this machine."""

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from dparallel.decoding.memory import free_bytes
from dparallel.models import weights
from dparallel.models.backbone import DiffusionTransformer
from dparallel.models.checkpoints import load_model
from dparallel.models.hub import checkpoint_folder
from dparallel.models.loader import releasing_memory
from dparallel.models.threads import fitting_threads
from dparallel.preflight.plan import Plan
from dparallel.preflight.work import Forwards

FORWARDS = 5  # forward passes of the measurement; the fastest is the least disturbed by other work
ROWS = 8  # rows per pass on a GPU, which are enough for its full speed
CPU_FLOPS = 1e11  # limit of FLOPs per timed forward pass on a CPU: up to a few seconds
SHORTEST = 64  # tokens; shorter rows would underuse a CPU's matrix units
LOADABLE = 0.8  # share of the free memory for weights; the rest is for the forward pass


@dataclass(frozen=True)
class Rate:
    """Throughput in canvas tokens per second of a forward pass, and how it was determined."""

    tokens_per_second: float
    origin: str

    def hours(self, forwards: Iterable[Forwards]) -> float:
        """Hours for these forward passes on one device."""
        return sum(part.tokens for part in forwards) / self.tokens_per_second / 3600


@releasing_memory
def measure_rate(plan: Plan) -> Rate | None:
    """Time some forward passes of the teacher; None if it is not available or does not fit into memory.

    A large model on a CPU reads a single short row, since a batch would take minutes.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = plan.shape.dtype
    if plan.parameters * dtype.itemsize > LOADABLE * free_bytes(device):
        return None
    if not weights.are_here(checkpoint_folder(plan.config.teacher, with_weights=False)):
        return None
    rows, length = timed_shape(plan, device)
    large = device.type == "cpu" and 2 * plan.parameters * rows * length > CPU_FLOPS
    count, what = 1 if large else FORWARDS, f"{rows} x {length} tokens on {device.type}"
    print(f"timing forward passes of {what}; use --rate N to skip this", file=sys.stderr, flush=True)
    model = load_model(plan.config.teacher, device, dtype)
    canvas = torch.randint(model.config.vocab_size, (rows, length), device=device)
    block = min(plan.config.trajectories.decoding.block_length, length)
    read = torch.arange(block, device=device).expand(rows, -1)
    with fitting_threads(model, rows):
        seconds = [_forward_seconds(model, canvas, read) for _ in range(1 + count)][1:]
    rate = canvas.numel() / min(seconds)
    return Rate(rate, f"measured here, with forward passes of {what}")


def timed_shape(plan: Plan, device: torch.device) -> tuple[int, int]:
    """Number of rows, and their length in tokens."""
    rows = plan.config.trajectories.batch_size
    if device.type == "cuda":
        return min(rows, ROWS), plan.shape.length
    tokens = max(SHORTEST, int(CPU_FLOPS / (2 * plan.parameters)))
    length = min(plan.shape.length, tokens)
    return max(1, min(rows, tokens // length)), length


@torch.inference_mode()
def _forward_seconds(model: DiffusionTransformer, canvas: torch.Tensor, read: torch.Tensor) -> float:
    began = time.perf_counter()
    model(canvas, logits_at=read).sum().item()  # waits for the device to finish
    return time.perf_counter() - began
