"""One denoise step of a group of rows, without host synchronisation.

A step gathers the rows' state, runs the forward pass, commits tokens and writes the state back.
Legend: b rows, L canvas length, G `gen_length`, K blocks of l positions, n positions read, w blocks
recomputed, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.blocks import (
    attention_levels,
    first_full,
    from_first,
    live,
    open_next,
    overdue,
    places,
    stalled,
    tokens_needed,
)
from dparallel.decoding.cache import CacheView, KeyValueStore
from dparallel.decoding.canvas import Canvas, settle_rounds
from dparallel.decoding.ends import behind_first, is_end
from dparallel.decoding.predictions import best, best_of_each, choose, commit, predict
from dparallel.decoding.revision import changed, final, settled, soft_inputs
from dparallel.decoding.sampling import uniform
from dparallel.models.backbone import DiffusionTransformer
from dparallel.rules.declaration import Context, Prediction, Weights
from dparallel.rules.rules import RULES, without


class Shape(NamedTuple):
    """Sizes of a step's tensors.

    Attributes:
        rows, reads: b and n.
        window: w; None for the whole canvas.
        length: L.
        padded: whether the canvas of some row is shorter.
        all_slots: whether the rows have the first b slots, in order.
    """

    rows: int
    reads: int
    window: int | None
    length: int
    padded: bool
    all_slots: bool


class Status(NamedTuple):
    """What the host needs to plan the next step of rows: arrays (b,), or numbers for a single row.

    Attributes:
        done: whether the row is finished.
        full: whether its next forward pass recomputes the whole canvas.
        reads, window: positions read and (with a cache) blocks recomputed by its next forward pass.
        opened: number of open blocks.
    """

    done: Any
    full: Any
    reads: Any
    window: Any
    opened: Any

    @classmethod
    def of(cls, table: Any) -> "Status":
        """Name the columns of a tensor or array (b, 5)."""
        return cls(*table.T)


class Outcome(NamedTuple):
    """Result of a step, on the device."""

    status: Tensor  # (b, 5), the columns of Status
    offsets: Tensor  # (b, n) response positions read
    read: Tensor  # (b, n) bool; the other positions are fill-ins
    token: Tensor  # (b, n), like probability and entropy
    probability: Tensor
    entropy: Tensor
    commit: Tensor  # (b, n) bool, whether the token is new at its position


@dataclass(frozen=True)
class Workspace:
    """What rows keep between forward passes, by slot, and the weights of their rule; None if not needed."""

    store: KeyValueStore | None
    previous: Tensor | None  # (slots, G, V) log-probabilities
    sureness: Tensor | None = None  # (slots, G) probability of each token when it was last read
    weights: Weights | None = None

    @classmethod
    def allocate(
        cls, model: DiffusionTransformer, decoding: DecodingConfig, slots: int, length: int
    ) -> "Workspace":
        """Memory for `slots` rows of canvases with `length` positions."""
        config, device = model.config, model.device
        store = previous = weights = sureness = None
        if decoding.cache != "none":
            store = KeyValueStore(config, slots, length, device, model.dtype)
        if RULES[decoding.rule].needs_previous:
            previous = torch.zeros(slots, decoding.gen_length, config.vocab_size, device=device)
        if RULES[decoding.rule].needs_weights:
            weights = model.commit_rule.on(device)
        if decoding.revises:
            sureness = torch.zeros(slots, decoding.gen_length, device=device)
        return cls(store, previous, sureness, weights)


@dataclass(frozen=True)
class Group:
    """The rows of a forward pass, and what it is computed with.

    Attributes:
        state: a copy of the rows' state.
        slots: (b,) slots of the rows in `workspace`.
    """

    model: DiffusionTransformer
    decoding: DecodingConfig
    workspace: Workspace
    shape: Shape
    state: Canvas
    slots: Tensor


def first_status(decoding: DecodingConfig) -> Status:
    """Status of a row before its first forward pass."""
    return Status(done=0, full=1, reads=decoding.block_length, window=decoding.blocks, opened=1)


def denoise(
    model: DiffusionTransformer,
    canvas: Canvas,
    workspace: Workspace,
    decoding: DecodingConfig,
    shape: Shape,
    rows: Tensor,
    slots: Tensor,
) -> Outcome:
    """Advance `rows` (b,) of `canvas`, with `slots` (b,) in `workspace`, by one forward pass, in place."""
    state = canvas.gather(rows)
    group = Group(model, decoding, workspace, shape, state, slots)

    # 1. Select the masked positions of open blocks, or all positions of the block that may be revised.
    readable = _readable(state, decoding)
    offsets = places(readable, shape.reads)  # (b, n)
    read = masked = readable.gather(1, offsets)
    if decoding.revises:
        masked = read & (state.commit_step.gather(1, offsets) < 0)

    # 2. Forward pass over the canvas, or over the blocks that change.
    logits = _forward(group, offsets)  # (b, n, V)
    if decoding.suppress_eos:
        logits = without(logits, model.config.eos_token_id)

    # 3. Predict and commit.
    where = state.positions(offsets)
    numbers = None
    if decoding.temperature > 0:
        numbers = uniform(state.seed, _draw(state, decoding), where, logits.shape[-1])
    told = decoding.temperature, decoding.top_p, numbers, decoding.top_k
    prediction = predict(logits, model.config.mask_token_id, *told)
    fixed = _commit(group, prediction, masked, offsets)
    if workspace.previous is not None:
        workspace.previous[slots[:, None], offsets] = prediction.log_probability
        state.seen = _put(state.seen, offsets, masked, masked)
    if workspace.sureness is not None:
        workspace.sureness[slots[:, None], offsets] = prediction.probability
        fixed = changed(prediction, read, masked, fixed, state.tokens.gather(1, where))

    # 4. Open blocks, finish rows, and report what the next forward pass needs.
    final_before = _final(state, decoding)
    state.tokens = _put(state.tokens, where, fixed, prediction.token)
    state.commit_step = _put(state.commit_step, offsets, fixed, state.nfe[:, None].expand_as(offsets))
    state.confidence = _put(state.confidence, offsets, fixed, prediction.probability)
    state.rounds_left = (state.rounds_left - final_before.long()).clamp(min=0)
    if decoding.final_threshold is not None:
        done = settled(prediction, read, fixed, decoding.final_threshold)  # (b,)
        complete = _committed(state, decoding) == decoding.block_length
        state.rounds_left = state.rounds_left.masked_fill(complete & done[:, None], 0)
    opens = _open_blocks(state, decoding, model.config.end_token_ids)
    state.nfe = state.nfe + 1
    no_blocks = torch.zeros_like(state.nfe)
    status = Status(
        done=_final_positions(state, decoding).all(1),
        full=_refresh(state, decoding, opens),
        reads=_readable(state, decoding).sum(1),
        window=no_blocks if decoding.cache == "none" else _window(state, decoding).sum(1),
        opened=state.opened,
    )
    canvas.scatter(rows, state)
    return Outcome(
        status=torch.stack([column.long() for column in status], 1),
        offsets=offsets,
        read=read,
        token=prediction.token,
        probability=prediction.probability,
        entropy=prediction.entropy,
        commit=fixed,
    )


def _forward(group: Group, offsets: Tensor) -> Tensor:
    """Logits (b, n, V) at the response positions `offsets` (b, n)."""
    state, shape, decoding = group.state, group.shape, group.decoding
    if shape.window is None:
        positions, input_ids = None, state.tokens[:, : shape.length]
        # Fill-in positions may belong to a block that is not open yet.
        read_at = state.positions(offsets).clamp(max=shape.length - 1)
    else:
        positions, read_at = _recomputed(group, shape.window, offsets)
        input_ids = state.tokens.gather(1, positions)
    visible = None
    levels = attention_levels(decoding, state.prompt_length, shape.length)
    if shape.padded and levels is None:
        ends = state.prompt_length[:, None] + state.room
        visible = torch.arange(shape.length, device=ends.device) < ends  # (b, L)
    cache = None
    if group.workspace.store is not None:
        cache = CacheView(group.workspace.store, group.slots, positions, shape.length, shape.all_slots)
    inputs = None
    if group.workspace.sureness is not None:
        start = (
            state.prompt_length[:, None] + offsets
        )  # (b, n) of the active block, from its first position on
        every = torch.arange(shape.length, device=start.device) if positions is None else positions
        inputs = soft_inputs(
            group.model.get_input_embeddings(),
            group.model.config.mask_token_id,
            input_ids,
            places=every - start[:, :1],
            tokens=state.tokens.gather(1, start),
            committed=state.commit_step.gather(1, offsets) >= 0,
            probability=group.workspace.sureness[group.slots[:, None], offsets],
        )
    return group.model(input_ids, visible, read_at, positions, cache, levels, inputs)


def _recomputed(group: Group, count: int, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The canvas positions recomputed by a forward pass over `count` blocks.

    A model that predicts the next token also needs the position before each block, whose logits predict the
    first token of the block. An autoregressive model needs only that position: its masked position
    contributes nothing.

    Returns:
        positions: (b, m) canvas positions.
        read_at: (b, n) indices of `offsets` in `positions`.
    """
    state, block_length = group.state, group.decoding.block_length
    window = _window(state, group.decoding)  # (b, K)
    blocks = places(window, count)  # (b, w)
    blocks = torch.where(
        window.gather(1, blocks), blocks, blocks[:, :1]
    )  # rows with fewer blocks repeat their first one
    before = int(group.model.config.predicts_next)
    own = 0 if group.decoding.mode == "autoregressive" else block_length
    within = torch.arange(-before, own, device=offsets.device)
    positions = (blocks[..., None] * block_length + within).flatten(1)  # (b, w (before + l))
    positions = (state.prompt_length[:, None] + positions).clamp(min=0)
    # Fill-in rows may have more blocks than are recomputed.
    place = (window.cumsum(1) - 1).clamp(0, count - 1).gather(1, offsets // block_length)
    return positions, place * len(within) + before + offsets % block_length


def _commit(group: Group, prediction: Prediction, masked: Tensor, offsets: Tensor) -> Tensor:
    """Which of the positions read, `offsets` (b, n), are committed; (b, n) bool."""
    decoding, block = group.decoding, offsets // group.decoding.block_length
    told = decoding.rule, decoding.parameters, prediction, masked, _context(group, offsets)
    if decoding.mode != "pipelined":
        score, fixed = commit(*told)
        if decoding.mode == "multi_block":
            fixed = fixed | best(score, overdue(block, masked, fixed))
        return fixed
    score, fixed = choose(*told)
    needed = tokens_needed(decoding.decoded_token_threshold or 1.0, decoding.block_length)
    committed = _committed(group.state, decoding)  # (b, K)
    fully_active = F.pad(committed[:, :-1] >= needed, (1, 0), value=True)  # (b, K)
    late = stalled(fully_active, block, masked, fixed)
    return fixed | best_of_each(score, late, block, decoding.blocks)


def _open_blocks(state: Canvas, decoding: DecodingConfig, end_token_ids: Sequence[int]) -> Tensor:
    """End rows at their first end token and open blocks; returns whether a block was opened, (b,) bool."""
    done = _final_positions(state, decoding)  # (b, G)
    may_open = torch.ones_like(state.nfe, dtype=torch.bool)
    if decoding.stop_at_eos or decoding.looks_back:
        every = torch.arange(decoding.gen_length, device=done.device)
        where = state.positions(every)
        held, fill = state.tokens.gather(1, where), next(iter(end_token_ids), 0)
        ends = done & is_end(held, end_token_ids)
        ended = torch.zeros_like(may_open)
        if decoding.stop_at_eos:
            ended = (ends & done.cummin(1).values).any(1)
        if decoding.looks_back:  # no further block opens
            unopened = every >= state.opened[:, None] * decoding.block_length
            ended = ended | (ends.any(1) & (done | unopened).all(1))
        filled = ended[:, None] & ~done
        if decoding.eos_fill == "immediate":  # also over tokens, whose blocks are then computed again
            filled = filled | (behind_first(ends) & (held != fill))
            state.confidence = state.confidence.masked_fill(filled, 0.0)
            blocks = filled.unflatten(1, (-1, decoding.block_length)).any(2)
            state.rounds_left = state.rounds_left.masked_fill(blocks, settle_rounds(decoding))
        state.tokens = _put(state.tokens, where, filled, torch.full_like(where, fill))
        state.commit_step = torch.where(filled, state.nfe[:, None], state.commit_step)
        if decoding.revises:
            state.rounds_left = state.rounds_left.masked_fill(ended[:, None], 0)
        may_open = ~ends.any(1)  # nothing is decoded after an end token
    needed = tokens_needed(decoding.block_add_threshold or 1.0, decoding.block_length)
    per_block = done.unflatten(1, (-1, decoding.block_length)).sum(2)  # (b, K)
    opens = open_next(per_block, state.opened, needed, may_open)
    state.opened = state.opened + opens
    state.block_forwards = torch.where(opens, 0, state.block_forwards + 1)
    return opens


def _readable(state: Canvas, decoding: DecodingConfig) -> Tensor:
    """Positions of open blocks that the next forward pass predicts, (b, G) bool."""
    every = torch.arange(decoding.gen_length, device=state.nfe.device)
    left = ~_final_positions(state, decoding) if decoding.revises else state.commit_step < 0
    return left & (every // decoding.block_length < state.opened[:, None])


def _final_positions(state: Canvas, decoding: DecodingConfig) -> Tensor:
    """Positions that no further forward pass changes, (b, G) bool: the committed ones, if none is revised."""
    return final(state.commit_step, state.rounds_left) if decoding.revises else state.commit_step >= 0


def _draw(state: Canvas, decoding: DecodingConfig) -> Tensor:
    """The number of the draw of a position's token, (b,): the forward pass, if none is revised.

    A revised position keeps its random numbers, so that its token changes only if its distribution does.
    """
    return torch.zeros_like(state.nfe) if decoding.revises else state.nfe


def _committed(state: Canvas, decoding: DecodingConfig) -> Tensor:
    """Committed tokens per block, (b, K)."""
    return (state.commit_step >= 0).unflatten(1, (-1, decoding.block_length)).sum(2)


def _final(state: Canvas, decoding: DecodingConfig) -> Tensor:
    """Blocks whose keys and values the last forward pass computed in final form, (b, K) bool."""
    committed = _committed(state, decoding)
    if decoding.looks_back:
        return first_full(committed, decoding.block_length)
    return committed == decoding.block_length


def _window(state: Canvas, decoding: DecodingConfig) -> Tensor:
    """The blocks recomputed by a forward pass with a cache, (b, K) bool."""
    blocks = live(_committed(state, decoding), decoding.block_length, state.opened, state.rounds_left)
    return from_first(blocks) if decoding.cache == "prefix" else blocks


def _refresh(state: Canvas, decoding: DecodingConfig, opens: Tensor) -> Tensor:
    """Whether the next forward pass recomputes the whole canvas, (b,) bool."""
    if decoding.cache == "none":
        return torch.ones_like(opens)
    if decoding.cache == "exact":
        return torch.zeros_like(opens)
    if decoding.refresh_every is None:
        return opens  # at the start of a block
    return state.nfe % decoding.refresh_every == 0


def _context(group: Group, offsets: Tensor) -> Context:
    """What the rule may read at the positions `offsets` (b, n)."""
    state, decoding = group.state, group.decoding
    previous = seen = None
    if group.workspace.previous is not None:
        previous = group.workspace.previous[group.slots[:, None], offsets]
        seen = state.seen.gather(1, offsets)
    return Context(
        blocks=decoding.blocks,
        block_length=decoding.block_length,
        mask_token_id=group.model.config.mask_token_id,
        block_forwards=state.block_forwards,
        previous=previous,
        seen=seen,
        offsets=offsets,
        weights=group.workspace.weights,
    )


def _put(values: Tensor, at: Tensor, where: Tensor, new: Tensor) -> Tensor:
    """`values` (b, m) with `new` (b, n) written at `at` (b, n) where `where` (b, n) is True."""
    return values.scatter(1, at, torch.where(where, new, values.gather(1, at)))
