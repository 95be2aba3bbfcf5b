"""The decoding loop: which rows a forward pass takes, and which ones replace finished rows."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.advance import advance
from dparallel.decoding.canvas import Canvas
from dparallel.decoding.compiled import prepared
from dparallel.decoding.denoise import Inputs, Outcome, Workspace, denoise
from dparallel.decoding.plan import plan_forward
from dparallel.decoding.stops import StopWatch
from dparallel.decoding.transfer import each_of, to_device, to_host
from dparallel.models.backbone import DiffusionTransformer


@dataclass(frozen=True)
class Forward:
    """What a forward pass did to b rows, at the n positions that it read.

    Attributes:
        rows: (b,) rows of the canvas.
        offsets: (b, n) response positions.
        read: (b, n) bool; the other positions only fill up rows that read fewer.
        token, probability, entropy: (b, n).
        new: (b, n) bool, whether the token is new at its position.
    """

    rows: np.ndarray
    offsets: np.ndarray
    read: np.ndarray
    token: np.ndarray
    probability: np.ndarray
    entropy: np.ndarray
    new: np.ndarray


def decode(
    model: DiffusionTransformer,
    canvas: Canvas,
    decoding: DecodingConfig,
    batch_size: int,
    observe: Callable[[Forward], None] | None = None,
    stops: StopWatch | None = None,
) -> None:
    """Fill `canvas` in place, up to `batch_size` rows at a time, in the order of its rows.

    Rows advance independently, with their own blocks and number of forward passes; when a row is finished,
    the next one takes its slot. With a cache, a forward pass contains either rows that recompute the whole
    canvas or rows that recompute some blocks; the former wait until they are a quarter of the batch.
    """
    rows = len(canvas.done)
    batch_size = min(batch_size, rows)
    if decoding.compile:
        batch_size = 1 << (batch_size.bit_length() - 1)  # a power of two, like the sizes of its groups
    slots = batch_size + (decoding.compile and batch_size > 1)
    with prepared(model, decoding, slots, canvas.tokens.shape[1]) as (workspace, step):
        batch = Batch(model, canvas, workspace, decoding, batch_size, step)
        batch.join(np.arange(batch_size), np.arange(batch_size))
        queued = batch_size
        while len(batch):
            forward = batch.forward()
            if stops is not None:
                stops.end(forward.rows)
            if observe is not None:
                observe(forward)
            free = batch.leave(canvas.done[batch.rows])[: rows - queued]
            batch.join(np.arange(queued, queued + len(free)), free)
            queued += len(free)


class Batch:
    """The rows of a canvas that take part in forward passes; rows join and leave between two of them.

    Attributes:
        rows: (b,) rows of the canvas, in the order of their slots.
        slots: (b,) their slots in the workspace, ascending.
    """

    def __init__(
        self,
        model: DiffusionTransformer,
        canvas: Canvas,
        workspace: Workspace,
        decoding: DecodingConfig,
        size: int,
        step: Callable[..., Outcome[Tensor]] = denoise,
    ):
        """
        Args:
            size: slots of the workspace that rows may take; the next one fills up compiled steps.
            step: `denoise`, which may be compiled.
        """
        self.model, self.canvas, self.workspace, self.decoding = model, canvas, workspace, decoding
        self.size = size
        self.rows = self.slots = np.empty(0, dtype=np.int64)
        self._step = step

    def __len__(self) -> int:
        return len(self.rows)

    def join(self, rows: np.ndarray, slots: np.ndarray) -> None:
        """Add new `rows` of the canvas, at `slots` of the workspace that no other row has."""
        if len(rows):
            order = np.argsort(np.append(self.slots, slots), kind="stable")
            self.rows, self.slots = np.append(self.rows, rows)[order], np.append(self.slots, slots)[order]

    def leave(self, leaving: np.ndarray) -> np.ndarray:
        """Remove the rows where `leaving` (b,) is True; returns the slots that are now free."""
        free = self.slots[leaving]
        if len(free):
            self.rows, self.slots = self.rows[~leaving], self.slots[~leaving]
        return free

    def forward(self) -> Forward:
        """One forward pass of rows that can be computed together."""
        model, decoding = self.model, self.decoding
        chosen = next_group(self.canvas.full[self.rows])
        rows, slots = self.rows[chosen], self.slots[chosen]
        plan = plan_forward(self.canvas, rows, slots, decoding, model.config)
        inputs = filled_up(plan.inputs, self.size) if decoding.compile else plan.inputs
        told = model, self.workspace, decoding, plan.shape, to_device(inputs, model.device)
        outcome = to_host(self._step(*told), len(rows))  # waits for the device
        new = advance(self.canvas, plan, outcome, decoding, model.config.end_token_ids)
        return Forward(
            rows, plan.offsets, plan.read, outcome.token, outcome.probability, outcome.entropy, new
        )


def next_group(full: np.ndarray) -> np.ndarray:
    """Places of the rows of the next forward pass: the rows that recompute their whole canvas, or all others.

    Args:
        full: (b,) bool.
    """
    whole, part = full.nonzero()[0], (~full).nonzero()[0]
    return whole if len(part) == 0 or 4 * len(whole) >= len(full) else part


def filled_up(inputs: Inputs[np.ndarray], spare_slot: int) -> Inputs[np.ndarray]:
    """Copies of the first row up to a number of rows that is a power of two, for few distinct shapes."""
    rows = len(inputs.slots)
    more = (1 << (rows - 1).bit_length()) - rows
    if not more:
        return inputs
    filled: Inputs[np.ndarray] = each_of(
        inputs, lambda part: np.concatenate([part, part[:1].repeat(more, axis=0)])
    )
    filled.slots[rows:] = spare_slot
    return filled
