"""Semi-autoregressive decoding: blocks left to right, a row moves on as soon as its block is full.

Legend: b rows still decoding, l `block_length`, V vocabulary.
"""

from collections.abc import Sequence

import torch

from dparallel.config import DecodingConfig
from dparallel.decoding.canvas import Canvas
from dparallel.decoding.rules import RULES, BlockStep, predict
from dparallel.decoding.sampling import uniform
from dparallel.models.backbone import DiffusionTransformer


def decode(
    model: DiffusionTransformer, canvas: Canvas, decoding: DecodingConfig, row_seeds: Sequence[int]
) -> None:
    """Fill `canvas` in place. Rows are independent: each has its own block, step and NFE."""
    rule = RULES[decoding.rule]
    device, length = canvas.tokens.device, decoding.block_length
    blocks = decoding.gen_length // length
    steps_per_block = decoding.steps // blocks if decoding.steps else None
    within_block = torch.arange(length, device=device)
    seeds = torch.tensor(row_seeds, device=device)
    block = torch.zeros(len(row_seeds), dtype=torch.long, device=device)
    denoise_step = torch.zeros_like(block)  # forwards the row's block has had
    rows = torch.arange(len(row_seeds), device=device)  # still decoding

    while len(rows):
        # 1. One forward, read at each row's own block.
        offsets = block[rows, None] * length + within_block  # (b, l)
        where = canvas.response[rows[:, None], offsets]
        visible = None if canvas.visible is None else canvas.visible[rows]
        logits = model(canvas.tokens[rows], visible, logits_at=where)  # (b, l, V)

        # 2. Predict and commit.
        numbers = (
            uniform(seeds[rows], canvas.nfe[rows], where, logits.shape[-1])
            if decoding.temperature > 0
            else None
        )
        prediction = predict(logits, canvas.mask_token_id, decoding.temperature, decoding.top_p, numbers)
        masked = canvas.commit_step[rows[:, None], offsets] < 0
        commit = rule(prediction, masked, BlockStep(decoding.threshold, steps_per_block, denoise_step[rows]))
        canvas.commit(rows, offsets, commit, prediction.token, prediction.probability)
        canvas.nfe[rows] += 1
        denoise_step[rows] += 1

        # 3. Move on: full blocks, ended rows.
        full = ~(masked & ~commit).any(dim=1)
        block[rows[full]] += 1
        denoise_step[rows[full]] = 0
        done = block[rows] == blocks
        if decoding.stop_at_eos:
            ended = canvas.ended(rows)
            canvas.fill_with_eos(rows[ended])
            done |= ended
        rows = rows[~done]
