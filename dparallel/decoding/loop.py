"""The decoding loop: choose the rows of each denoise step, and replace finished rows (continuous batching).

The host decides from a small table returned by each step; nothing else is read from the device.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.canvas import Canvas
from dparallel.decoding.compiled import compiled_denoise
from dparallel.decoding.denoise import Outcome, Shape, Status, Workspace, denoise, first_status
from dparallel.decoding.stops import StopWatch
from dparallel.models.backbone import DiffusionTransformer

DONE = Status._fields.index("done")


def decode(
    model: DiffusionTransformer,
    canvas: Canvas,
    prompt_lengths: Sequence[int],
    decoding: DecodingConfig,
    batch_size: int,
    observe: Callable[[Outcome, np.ndarray], None] | None = None,
    stops: StopWatch | None = None,
) -> None:
    """Fill `canvas` in place, up to `batch_size` rows at a time, in the order of its rows.

    Rows advance independently, with their own blocks and number of forward passes; when a row is finished,
    the next one takes its slot. With a cache, a forward pass contains either rows that recompute the whole
    canvas or rows that recompute some blocks; the former wait until they are a quarter of the batch.
    """
    rows, device = len(prompt_lengths), canvas.tokens.device
    prompts = np.asarray(prompt_lengths)
    batch_size = min(batch_size, rows)
    if decoding.compile:
        batch_size = 1 << (batch_size.bit_length() - 1)  # a power of two, like the sizes of its groups
    slot_count = batch_size + (decoding.compile and batch_size > 1)
    workspace = Workspace.allocate(model, decoding, slot_count, canvas.tokens.shape[1])
    step = compiled_denoise(device) if decoding.compile else denoise
    start = first_status(decoding)
    spare = np.array([[rows], [batch_size]])  # a spare row and slot that fill up a fixed shape

    active = np.arange(batch_size)
    slots = np.arange(batch_size)
    status = np.tile(start, (batch_size, 1))
    queued = batch_size
    while len(active):
        # 1. One forward pass of rows that can be computed together.
        chosen = next_group(status)
        in_use = prompts[active[chosen]] + (
            decoding.block_length * Status.of(status[chosen]).opened
            if decoding.looks_back
            else decoding.gen_length
        )
        shape = shape_of(decoding, status[chosen], in_use, canvas.tokens.shape[1], batch_size)
        group = np.stack([active[chosen], slots[chosen]])
        group = np.hstack([group, spare.repeat(shape.rows - len(chosen), axis=1)])
        outcome = step(model, canvas, workspace, decoding, shape, *_to_device(group, device))
        if stops is not None:
            outcome.status[stops.end(active[chosen]), DONE] = 1
        if observe is not None:
            observe(outcome, active[chosen])
        status[chosen] = outcome.status[: len(chosen)].cpu().numpy()  # the only synchronisation

        # 2. Waiting rows replace finished ones.
        free = np.flatnonzero(Status.of(status).done)
        refilled, closed = np.split(free, [min(len(free), rows - queued)])
        active[refilled] = np.arange(queued, queued + len(refilled))
        status[refilled] = start
        queued += len(refilled)
        if len(closed):
            active, slots = np.delete(active, closed), np.delete(slots, closed)
            status = np.delete(status, closed, axis=0)


def next_group(status: np.ndarray) -> np.ndarray:
    """Rows of the next forward pass: those that recompute the whole canvas, or those that do not."""
    recomputes_all = Status.of(status).full > 0
    full, part = np.flatnonzero(recomputes_all), np.flatnonzero(~recomputes_all)
    return full if len(part) == 0 or 4 * len(full) >= len(status) else part


def shape_of(
    decoding: DecodingConfig, status: np.ndarray, lengths: np.ndarray, longest: int, batch_size: int
) -> Shape:
    """Sizes of the next step; compiled steps use few distinct ones."""
    columns = Status.of(status)
    rows, reads, length = len(status), int(columns.reads.max()), int(lengths.max())
    window = None if columns.full[0] else int(columns.window.max())
    all_slots = window is not None and rows == batch_size
    if decoding.compile:
        rows = 1 << (rows - 1).bit_length()
        window = window and min(1 << (window - 1).bit_length(), decoding.blocks)
        reads = -(-reads // decoding.block_length) * decoding.block_length
        length = longest
    return Shape(rows, reads, window, length, bool((lengths < length).any()), all_slots)


def _to_device(rows: np.ndarray, device: torch.device) -> Tensor:
    """Copy a small table to the device without waiting for it."""
    table = torch.from_numpy(rows)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
