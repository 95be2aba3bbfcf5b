"""`infill`: decode the masked positions of canvases, whose other positions hold given text.

The response positions of a row are those of its gaps, from left to right. A gap is a run of masked positions,
and divided into blocks by itself; its last block may be shorter than `block_length`. Such a block has missing
positions in the tensors, which count as committed from the start and point to a given token, so that nothing
reads or writes there.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np
import torch

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.canvas import Canvas, DecodingError, Generation, Step
from dparallel.decoding.generate import (
    LengthError,
    check_batch_size,
    check_ids,
    check_special_tokens,
    decode_rows,
    longest_first,
    row_seed,
    rows_together,
)
from dparallel.decoding.token_lists import check_padding
from dparallel.models.backbone import DiffusionConfig, DiffusionTransformer
from dparallel.models.commit_rule import check_commit_rule
from dparallel.models.defaults import decoding_of_model
from dparallel.rules.rules import RULES

MODES = ("sequential", "multi_block")


@torch.inference_mode()
def infill(
    model: DiffusionTransformer,
    canvases: Sequence[Sequence[int]],
    decoding: DecodingConfig | None = None,
    batch_size: int | None = None,
    observe: Callable[[list[Step]], None] | None = None,
) -> list[Generation]:
    """Fill the masked positions of each canvas, in the order of the canvases.

    Tokens, commit steps and NFE of a row do not depend on the other rows of its batch.

    Args:
        model: from `load_model`, with full attention.
        canvases: token ids (L,) of any lengths, with the mask token at the positions to be filled.
        decoding: how to decode, in the mode `sequential` or `multi_block` without a cache; by default as the
            checkpoint says. The gaps take the place of `gen_length`; `steps` of the rule `steps` stand for as
            many forward passes per block as in `decoding`; `stop_at_eos` and `eos_fill` have no effect.
        batch_size: rows decoded together (default 32); reduced with a warning if memory is short.
        observe: as of `generate`; `Step.offsets` count the masked positions of the canvas from the left.

    Returns:
        One `Generation` per canvas, with the tokens of its masked positions from left to right. `num_tokens`
        counts these without end tokens.

    Raises:
        DecodingError: a canvas, the settings or the model do not suit.
        MemoryError: a single row does not fit into memory.
    """
    if decoding is None:
        decoding = decoding_of_model(model)
    check_infill(model, canvases, decoding)
    check_commit_rule(decoding, model.commit_rule)
    check_batch_size(batch_size)
    if not canvases:
        return []
    mask, order = model.config.mask_token_id, longest_first(canvases)
    ordered = [canvases[row] for row in order]
    layouts = [gap_blocks(canvas, mask, decoding) for canvas in ordered]
    suited = fitted(decoding, max(map(len, layouts)))
    rows = rows_together(model, len(ordered[0]), suited, batch_size, len(canvases))
    seeds = [row_seed(decoding.seed, canvas) for canvas in ordered]
    canvas = start_gaps(ordered, layouts, seeds, suited, model.config)
    real = {
        row: [offset for offset, place in enumerate(layout) if place is not None]
        for row, layout in zip(order, layouts, strict=True)
    }
    watch = None if observe is None else _numbered(observe, real)
    generations = decode_rows(model, canvas, order, suited, rows, watch)
    ends = model.config.end_token_ids
    return [_without_missing(each, real[row], ends) for row, each in enumerate(generations)]


def check_infill(
    model: DiffusionTransformer, canvases: Sequence[Sequence[int]], decoding: DecodingConfig
) -> None:
    """Raise a DecodingError for canvases, settings or models that `infill` cannot decode."""
    if not isinstance(decoding, DecodingConfig):
        raise DecodingError(
            f"decoding={decoding!r}: give a DecodingConfig, such as DecodingConfig(rule='entropy')"
        )
    config = model.config
    if config.attention_pattern not in ("full", None):
        raise DecodingError(
            f"infill with a model of attention_pattern={config.attention_pattern!r} (its config.json): its "
            "tokens do not attend to the text behind a gap; take a model with full attention, such as its "
            "teacher"
        )
    if decoding.mode not in MODES:
        reason = "it revises whole blocks, and those of gaps may be shorter"
        if decoding.looks_back:
            reason = "no token attends to the text behind a gap"
        raise DecodingError(
            f"mode={decoding.mode!r} with infill: there {reason}; use mode={' or '.join(map(repr, MODES))}"
        )
    if decoding.cache != "none":
        raise DecodingError(
            f"cache={decoding.cache!r} with infill: the text between gaps is in no block, so that its keys "
            "and values would never be computed again; use cache='none'"
        )
    check_special_tokens(config, decoding.model_copy(update={"stop_at_eos": False}))
    for row, canvas in enumerate(canvases):
        name, limit = f"infill {row}", config.max_position_embeddings
        if len(canvas) > limit:
            raise LengthError(
                f"{name} has {len(canvas)} tokens with its gaps, and this model takes {limit} "
                "(max_position_embeddings): shorten its text or gaps"
            )
        given = [token for token in canvas if token != config.mask_token_id]
        masked = len(canvas) - len(given)
        if not masked or not given:
            lacking = "gap" if given else "text"
            raise DecodingError(f"{name} has no {lacking}: an infill is text with at least one gap")
        check_ids(name, given, config)
        check_padding(name, canvas, config)
        if RULES[decoding.rule].whole_response and (decoding.steps or 0) > masked:
            raise DecodingError(
                f"steps={decoding.steps} for rule={decoding.rule!r}, and {name} has {masked} tokens to fill: "
                f"give at most steps={masked}"
            )


def gap_blocks(canvas: Sequence[int], mask_token_id: int, decoding: DecodingConfig) -> list[int | None]:
    """Canvas position of each response position, by blocks; None where a block is shorter.

    Rules that treat the response as one block have one block of all gaps.
    """
    masked = [place for place, token in enumerate(canvas) if token == mask_token_id]
    if RULES[decoding.rule].whole_response:
        return [*masked]
    blocks: list[int | None] = []
    for _, run in groupby(enumerate(masked), key=lambda pair: pair[1] - pair[0]):
        gap = [place for _, place in run]
        blocks += [*gap, *[None] * (-len(gap) % decoding.block_length)]
    return blocks


def fitted(decoding: DecodingConfig, length: int) -> DecodingConfig:
    """The settings for `length` response positions, without an end of rows at end tokens."""
    changes: dict[str, object] = {"gen_length": length, "stop_at_eos": False, "eos_fill": None}
    if RULES[decoding.rule].whole_response:
        changes["block_length"] = length
    elif decoding.steps is not None:
        changes["steps"] = decoding.steps // decoding.blocks * (length // decoding.block_length)
    return decoding.model_copy(update=changes)


def start_gaps(
    canvases: Sequence[Sequence[int]],
    layouts: Sequence[Sequence[int | None]],
    seeds: Sequence[int],
    decoding: DecodingConfig,
    config: DiffusionConfig,
) -> Canvas:
    """The state of rows before their first forward pass.

    Args:
        layouts: of each row, see `gap_blocks`.
        decoding: as `fitted` returns it, for the longest layout.
    """
    canvas = Canvas.start(canvases, seeds, decoding, config, room=0)
    canvas.gaps = np.zeros_like(canvas.commit_step)
    for row, (tokens, layout) in enumerate(zip(canvases, layouts, strict=True)):
        given = next(place for place, token in enumerate(tokens) if token != config.mask_token_id)
        padded = [*layout, *[None] * (decoding.gen_length - len(layout))]
        canvas.gaps[row] = [given if place is None else place for place in padded]
        canvas.commit_step[row] = [0 if place is None else -1 for place in padded]
    return canvas


def _numbered(
    observe: Callable[[list[Step]], None], real: dict[int, list[int]]
) -> Callable[[list[Step]], None]:
    """`observe` with offsets that count masked positions only."""
    numbers = {row: {offset: number for number, offset in enumerate(each)} for row, each in real.items()}

    def watch(forward: list[Step]) -> None:
        observe(
            [
                replace(step, offsets=[numbers[step.row][offset] for offset in step.offsets])
                for step in forward
            ]
        )

    return watch


def _without_missing(generation: Generation, real: Sequence[int], ends: Sequence[int]) -> Generation:
    tokens = [generation.tokens[offset] for offset in real]
    return Generation(
        tokens=tokens,
        commit_step=[generation.commit_step[offset] for offset in real],
        confidence=[generation.confidence[offset] for offset in real],
        nfe=generation.nfe,
        num_tokens=sum(token not in ends for token in tokens),
    )
