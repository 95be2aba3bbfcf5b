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
    rows = len(prompt_lengths)
    batch_size = min(batch_size, rows)
    if decoding.compile:
        batch_size = 1 << (batch_size.bit_length() - 1)  # a power of two, like the sizes of its groups
    slot_count = batch_size + (decoding.compile and batch_size > 1)
    workspace = Workspace.allocate(model, decoding, slot_count, canvas.tokens.shape[1])
    batch = Batch(model, canvas, workspace, decoding, batch_size, spare=(rows, batch_size))
    batch.join(np.arange(batch_size), np.arange(batch_size), prompt_lengths[:batch_size])
    queued = batch_size
    while len(batch):
        outcome, advanced = batch.forward()
        if stops is not None:
            outcome.status[stops.end(advanced), DONE] = 1
        if observe is not None:
            observe(outcome, advanced)
        batch.read(outcome)  # the only synchronisation
        slots = batch.leave(batch.done)[: rows - queued]
        waiting = np.arange(queued, queued + len(slots))
        batch.join(waiting, slots, prompt_lengths[queued : queued + len(slots)])
        queued += len(slots)


class Batch:
    """The rows of a canvas that take part in forward passes; rows join and leave between two of them.

    Attributes:
        rows: (b,) rows of the canvas, in the order of their slots.
        slots: (b,) their slots in the workspace, ascending.
        status: (b, 5) the columns of `Status`, as of the rows' last forward pass.
    """

    def __init__(
        self,
        model: DiffusionTransformer,
        canvas: Canvas,
        workspace: Workspace,
        decoding: DecodingConfig,
        size: int,
        spare: tuple[int, int] = (0, 0),
    ):
        """
        Args:
            size: slots of the workspace that rows may take.
            spare: a row and a slot that fill up the fixed shapes of compiled steps.
        """
        self.model, self.canvas, self.workspace, self.decoding = model, canvas, workspace, decoding
        self.size = size
        self.rows = self.slots = self.prompts = np.empty(0, dtype=np.int64)
        self.status = np.empty((0, len(Status._fields)), dtype=np.int64)
        self._step = compiled_denoise(canvas.tokens.device) if decoding.compile else denoise
        self._first = np.array(first_status(decoding))
        self._spare = np.array(spare)[:, None]
        self._chosen = self.rows  # places of the rows of the last forward pass

    def __len__(self) -> int:
        return len(self.rows)

    def join(self, rows: np.ndarray, slots: np.ndarray, prompt_lengths: Sequence[int]) -> None:
        """Add new `rows` of the canvas, at `slots` of the workspace that no other row has."""
        order = np.argsort(np.append(self.slots, slots), kind="stable")
        self.rows = np.append(self.rows, rows)[order]
        self.slots = np.append(self.slots, slots)[order]
        self.prompts = np.append(self.prompts, np.asarray(prompt_lengths, dtype=np.int64))[order]
        self.status = np.vstack([self.status, np.tile(self._first, (len(rows), 1))])[order]

    def leave(self, leaving: np.ndarray) -> np.ndarray:
        """Remove the rows where `leaving` (b,) is True; returns the slots that are now free."""
        free, stays = self.slots[leaving], ~leaving
        if len(free):
            self.rows, self.slots, self.prompts, self.status = (
                part[stays] for part in (self.rows, self.slots, self.prompts, self.status)
            )
        return free

    def forward(self) -> tuple[Outcome, np.ndarray]:
        """One forward pass of rows that can be computed together.

        Returns:
            Its result, to be given to `read`, and these rows of the canvas.
        """
        decoding, canvas = self.decoding, self.canvas
        chosen = self._chosen = next_group(self.status)
        in_use = self.prompts[chosen] + (
            decoding.block_length * Status.of(self.status[chosen]).opened
            if decoding.looks_back
            else canvas.room
        )
        shape = shape_of(decoding, self.status[chosen], in_use, canvas.tokens.shape[1], self.size)
        group = np.stack([self.rows[chosen], self.slots[chosen]])
        group = np.hstack([group, self._spare.repeat(shape.rows - len(chosen), axis=1)])
        rows, slots = _to_device(group, canvas.tokens.device)
        outcome = self._step(self.model, canvas, self.workspace, decoding, shape, rows, slots)
        return outcome, self.rows[chosen]

    def read(self, outcome: Outcome) -> None:
        """Take over the status that the last forward pass returned; waits for the device."""
        self.status[self._chosen] = outcome.status[: len(self._chosen)].cpu().numpy()

    @property
    def done(self) -> np.ndarray:
        """Which rows are finished, (b,) bool."""
        return Status.of(self.status).done > 0


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
