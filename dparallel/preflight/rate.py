"""How fast the teacher reads on this machine, timed on the real one."""

import statistics
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
from dparallel.preflight.plan import Plan
from dparallel.preflight.work import Forwards

FORWARDS, ROWS = 3, 8  # timed for the rate
CPU_FLOPS = 1e11  # of one forward that is timed on a CPU: a second or a few
SHORTEST = 64  # tokens; fewer would not fill a CPU's matrix products
LOADABLE = 0.8  # of the free memory; the rest is for a forward


@dataclass(frozen=True)
class Rate:
    """Canvas tokens through the model in a second, forward, and where the number is from."""

    tokens_per_second: float
    origin: str

    def hours(self, forwards: Iterable[Forwards]) -> float:
        return sum(part.tokens for part in forwards) / self.tokens_per_second / 3600


@releasing_memory
def measure_rate(plan: Plan) -> Rate | None:
    """Time a few forwards of the real teacher; None if it is not here or does not fit into the memory.

    On a CPU, where a large model would take minutes for a batch, a large one reads a single short row.
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
    print(f"timing forwards of {what}; --rate N saves it", file=sys.stderr, flush=True)
    model = load_model(plan.config.teacher, device, dtype)
    canvas = torch.randint(model.config.vocab_size, (rows, length), device=device)
    block = min(plan.config.trajectories.decoding.block_length, length)
    read = torch.arange(block, device=device).expand(rows, -1)
    seconds = [_forward_seconds(model, canvas, read) for _ in range(1 + count)][1:]
    rate = canvas.numel() / statistics.median(seconds)
    return Rate(rate, f"measured here, forwards of {what}")


def timed_shape(plan: Plan, device: torch.device) -> tuple[int, int]:
    """Rows and their length."""
    rows = min(plan.config.trajectories.batch_size, ROWS)
    if device.type == "cuda":
        return rows, plan.shape.length
    tokens = max(SHORTEST, int(CPU_FLOPS / (2 * plan.parameters)))
    length = min(plan.shape.length, tokens)
    return max(1, min(rows, tokens // length)), length


@torch.inference_mode()
def _forward_seconds(model: DiffusionTransformer, canvas: torch.Tensor, read: torch.Tensor) -> float:
    began = time.perf_counter()
    model(canvas, logits_at=read).sum().item()  # waits for the device
    return time.perf_counter() - began
