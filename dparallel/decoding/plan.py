"""What the next forward pass of some rows computes, reads and may commit; decided on the host.

Legend: b rows, m positions of the input, n positions read, L canvas length, G `gen_length`, K blocks of l
positions, w blocks recomputed.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.blocks import at, from_first, live, places
from dparallel.decoding.canvas import Canvas
from dparallel.decoding.denoise import Inputs, Shape
from dparallel.decoding.patterns import attention_levels
from dparallel.decoding.revision import final
from dparallel.models.backbone import DiffusionConfig
from dparallel.rules.rules import RULES


@dataclass(frozen=True)
class Plan:
    """A forward pass of `rows` (b,) of the canvas.

    Attributes:
        offsets, where: (b, n) the positions read, in the response and on the canvas.
        read: (b, n) bool; the other positions only fill up rows that read fewer.
        masked: (b, n) bool, which of those read are masked.
        shape, inputs: what `denoise` takes; `inputs` are arrays, with further rows to fill up a fixed shape.
    """

    rows: np.ndarray
    offsets: np.ndarray
    where: np.ndarray
    read: np.ndarray
    masked: np.ndarray
    shape: Shape
    inputs: Inputs[np.ndarray]


def plan_forward(
    canvas: Canvas, rows: np.ndarray, slots: np.ndarray, decoding: DecodingConfig, config: DiffusionConfig
) -> Plan:
    """Plan a forward pass of `rows` (b,) that can be computed together, at `slots` (b,) of the workspace."""
    readable = positions_to_read(canvas, rows, decoding)  # (b, G)
    count = int(readable.sum(1).max())
    if decoding.compile:  # few distinct shapes
        count = -(-count // decoding.block_length) * decoding.block_length
    offsets = places(readable, count)
    read = masked = at(readable, offsets)
    where = canvas.positions(rows, offsets)
    more: dict[str, Any] = {}
    if decoding.revises:
        committed = canvas.commit_step[rows[:, None], offsets] >= 0
        masked = read & ~committed
        more |= {"held": canvas.tokens[rows[:, None], where], "committed": committed, "where": where}
    if decoding.temperature > 0:
        # A revised position keeps its random numbers: its token changes only if its distribution does.
        draw = np.zeros_like(rows) if decoding.revises else canvas.nfe[rows]
        more |= {"seed": canvas.seed[rows], "draw": draw, "where": where}
    if RULES[decoding.rule].needs_previous:
        more["seen"] = canvas.seen[rows[:, None], offsets]

    whole = bool(canvas.full[rows[0]])
    behind = decoding.block_length * canvas.opened[rows] if decoding.looks_back else canvas.room
    ends = canvas.prompt_length[rows] + behind  # (b,) of the positions in use
    if decoding.mode == "autoregressive" and not whole:
        ends = ends - 1  # the masked position contributes nothing
    length = canvas.tokens.shape[1] if decoding.compile else int(ends.max())
    reads: np.ndarray | None
    if whole:
        tokens, open_ended = canvas.tokens[rows, :length], False
        reads = np.minimum(where, length - 1)  # what only fills up may belong to a block that is not open yet
    else:
        positions, reads, open_ended = _recomputed(canvas, rows, offsets, decoding, config)
        tokens = canvas.tokens[rows[:, None], positions]
        more["positions"] = positions
    if decoding.looks_back and not open_ended:
        lengths = torch.from_numpy(canvas.prompt_length[rows])
        levels = attention_levels(decoding, lengths, length)
        assert levels is not None
        more["levels"] = levels.numpy()
    elif (ends < length).any():
        more["visible"] = np.arange(length) < ends[:, None]
    inputs = Inputs(tokens, reads, masked, offsets, slots, canvas.block_forwards[rows], **more)
    return Plan(rows, offsets, where, read, masked, Shape(length, _are_first(slots)), inputs)


def positions_to_read(canvas: Canvas, rows: np.ndarray, decoding: DecodingConfig) -> np.ndarray:
    """Positions of open blocks that the next forward pass predicts, (b, G) bool."""
    left = ~final_positions(canvas, rows, decoding)
    return left & (np.arange(decoding.gen_length) < canvas.opened[rows, None] * decoding.block_length)


def final_positions(canvas: Canvas, rows: np.ndarray, decoding: DecodingConfig) -> np.ndarray:
    """Positions that no further forward pass changes, (b, G) bool: the committed ones, if none is revised."""
    if decoding.revises:
        return final(canvas.commit_step[rows], canvas.rounds_left[rows])
    return canvas.commit_step[rows] >= 0


def committed_tokens(canvas: Canvas, rows: np.ndarray, decoding: DecodingConfig) -> np.ndarray:
    """Committed tokens per block, (b, K)."""
    return (canvas.commit_step[rows] >= 0).reshape(len(rows), decoding.blocks, -1).sum(2)


def _recomputed(
    canvas: Canvas, rows: np.ndarray, offsets: np.ndarray, decoding: DecodingConfig, config: DiffusionConfig
) -> tuple[np.ndarray, np.ndarray | None, bool]:
    """The canvas positions recomputed by a forward pass with a cache.

    A model that predicts the next token also needs the position before each block, whose logits predict the
    first token of the block. An autoregressive model needs only that position.

    Returns:
        positions: (b, m) canvas positions.
        reads: (b, n) indices of `offsets` in `positions`; None if these are all of them.
        open_ended: whether all of them attend to everything in use.
    """
    block_length = decoding.block_length
    window = live(
        committed_tokens(canvas, rows, decoding), block_length, canvas.opened[rows], canvas.rounds_left[rows]
    )  # (b, K)
    if decoding.cache == "prefix":
        window = from_first(window)
    count = int(window.sum(1).max())
    if decoding.compile:
        count = min(1 << (count - 1).bit_length(), decoding.blocks)
    blocks = places(window, count)  # (b, w)
    # Rows with fewer blocks repeat their first one.
    blocks = np.where(at(window, blocks), blocks, blocks[:, :1])
    before = int(config.predicts_next)
    if decoding.mode == "autoregressive":
        return canvas.prompt_length[rows, None] + blocks - before, None, True
    within = np.arange(-before, block_length)
    positions = (blocks[..., None] * block_length + within).reshape(len(rows), -1)
    positions = np.maximum(canvas.prompt_length[rows, None] + positions, 0)
    # What only fills up may be in a block that is not recomputed.
    place = np.clip(window.cumsum(1) - 1, 0, count - 1)
    reads = at(place, offsets // block_length) * len(within)
    reads += before + offsets % block_length
    last = not before and count == 1 and bool((blocks[:, 0] == canvas.opened[rows] - 1).all())
    return positions, reads, last


def _are_first(slots: np.ndarray) -> bool:
    return bool((slots == np.arange(len(slots))).all())
