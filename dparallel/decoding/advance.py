"""What a forward pass changes in the rows of a canvas: tokens, open blocks, ends; on the host.

Legend: b rows, n positions read, G `gen_length`, K blocks.
"""

from collections.abc import Sequence

import numpy as np

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.blocks import (
    best,
    best_of_each,
    first_full,
    open_next,
    overdue,
    stalled,
    tokens_needed,
)
from dparallel.decoding.canvas import Canvas, settle_rounds
from dparallel.decoding.denoise import Outcome
from dparallel.decoding.ends import behind_first, is_end
from dparallel.decoding.plan import Plan, committed_tokens, final_positions
from dparallel.decoding.revision import changed, settled
from dparallel.rules.rules import RULES


def advance(
    canvas: Canvas,
    plan: Plan,
    outcome: Outcome[np.ndarray],
    decoding: DecodingConfig,
    end_token_ids: Sequence[int],
) -> np.ndarray:
    """Apply the `outcome` (arrays) of a planned forward pass to the canvas, in place.

    Returns:
        (b, n) bool, the positions read whose token is new.
    """
    rows, settles = plan.rows, settle_rounds(decoding) > 0
    before = None
    if settles or decoding.mode == "pipelined":
        before = committed_tokens(canvas, rows, decoding)  # (b, K)
    new = commits(plan, outcome, decoding, before)
    if outcome.sure is not None:
        assert plan.inputs.held is not None
        new = changed(outcome.token, plan.read, plan.masked, new, plan.inputs.held)
    at, place = new.nonzero()
    row, offset = rows[at], plan.offsets[at, place]
    canvas.tokens[row, plan.where[at, place]] = outcome.token[at, place]
    canvas.commit_step[row, offset] = canvas.nfe[row]
    canvas.confidence[row, offset] = outcome.probability[at, place]
    if RULES[decoding.rule].needs_previous:
        at, place = plan.masked.nonzero()
        canvas.seen[rows[at], plan.offsets[at, place]] = True

    if settles:  # the forward pass included blocks in final form
        assert before is not None
        whole = before == decoding.block_length
        if decoding.looks_back:
            whole = first_full(before, decoding.block_length)
        canvas.rounds_left[rows] = np.maximum(canvas.rounds_left[rows] - whole, 0)
    if outcome.sure is not None:
        after = committed_tokens(canvas, rows, decoding)
        done = settled(outcome.sure, plan.read, new)[:, None] & (after == decoding.block_length)
        canvas.rounds_left[rows] = np.where(done, 0, canvas.rounds_left[rows])
    final = _end_and_open(canvas, rows, decoding, end_token_ids)
    canvas.nfe[rows] += 1
    canvas.done[rows] = final.all(1)
    if decoding.cache != "none" and decoding.refresh_every is not None:
        canvas.full[rows] = canvas.nfe[rows] % decoding.refresh_every == 0
    return new


def commits(
    plan: Plan, outcome: Outcome[np.ndarray], decoding: DecodingConfig, committed: np.ndarray | None
) -> np.ndarray:
    """Which of the positions read are committed: what the rule selects, and what must advance; (b, n) bool.

    Args:
        committed: (b, K) committed tokens per block before the forward pass; for the mode `pipelined`.
    """
    score, masked, chosen = outcome.score, plan.masked, outcome.chosen
    if decoding.mode == "pipelined":
        assert committed is not None
        needed = tokens_needed(decoding.decoded_token_threshold or 1.0, decoding.block_length)
        fully_active = np.ones(committed.shape, dtype=bool)
        fully_active[:, 1:] = committed[:, :-1] >= needed
        block = plan.offsets // decoding.block_length
        return chosen | best_of_each(score, stalled(fully_active, block, masked, chosen), block)
    if not RULES[decoding.rule].whole_response:  # Dream's samplers may commit nothing
        chosen = chosen | best(score, masked)
    if decoding.mode == "multi_block":
        block = plan.offsets // decoding.block_length
        chosen = chosen | best(score, overdue(block, masked, chosen))
    return chosen


def _end_and_open(
    canvas: Canvas, rows: np.ndarray, decoding: DecodingConfig, end_token_ids: Sequence[int]
) -> np.ndarray:
    """End rows at their first end token, and open blocks; returns what is final then, (b, G) bool."""
    final = final_positions(canvas, rows, decoding)
    may_open = np.ones(len(rows), dtype=bool)
    if decoding.stop_at_eos or decoding.looks_back:
        may_open = ~_end(canvas, rows, final, decoding, end_token_ids)  # nothing follows an end token
        if not may_open.all():
            final = final_positions(canvas, rows, decoding)
    needed = tokens_needed(decoding.block_add_threshold or 1.0, decoding.block_length)
    per_block = final.reshape(len(rows), decoding.blocks, -1).sum(2)
    opens = open_next(per_block, canvas.opened[rows], needed, may_open)
    canvas.opened[rows] += opens
    canvas.block_forwards[rows] = np.where(opens, 0, canvas.block_forwards[rows] + 1)
    if decoding.cache != "none":
        canvas.full[rows] = opens & (decoding.cache != "exact")  # prefix and dual start blocks anew
    return final


def _end(
    canvas: Canvas,
    rows: np.ndarray,
    done: np.ndarray,
    decoding: DecodingConfig,
    end_token_ids: Sequence[int],
) -> np.ndarray:
    """Fill what an end token leaves open; returns which rows hold one, (b,) bool.

    Args:
        done: (b, G) bool, the positions that are final.
    """
    held, fill = canvas.responses(rows), next(iter(end_token_ids), 0)
    ends = done & is_end(held, end_token_ids)
    has_end = ends.any(1)
    if not has_end.any():
        return has_end
    every = np.arange(decoding.gen_length)
    ended = np.zeros_like(has_end)
    if decoding.stop_at_eos:
        ended = (ends & np.logical_and.accumulate(done, axis=1)).any(1)
    if decoding.looks_back:  # no further block opens
        unopened = every >= canvas.opened[rows, None] * decoding.block_length
        ended |= has_end & (done | unopened).all(1)
    filled = ended[:, None] & ~done
    if decoding.eos_fill == "immediate":  # also over tokens, whose blocks are then computed again
        filled |= behind_first(ends) & (held != fill)
        canvas.confidence[rows] = np.where(filled, 0, canvas.confidence[rows])
        blocks = filled.reshape(len(rows), decoding.blocks, -1).any(2)
        canvas.rounds_left[rows] = np.where(blocks, settle_rounds(decoding), canvas.rounds_left[rows])
    at, offset = filled.nonzero()
    canvas.tokens[rows[at], canvas.positions(rows, every)[at, offset]] = fill
    canvas.commit_step[rows[at], offset] = canvas.nfe[rows[at]]
    if decoding.revises:
        canvas.rounds_left[rows[ended]] = 0
    return has_end
