"""The reference decoder of `infill`, as slow and simple as `oracle`, whose readings and rules it shares."""

from collections.abc import Sequence

import torch

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.canvas import Generation
from dparallel.decoding.oracle import final_probability, probabilities, rank, read, selected
from dparallel.models.backbone import DiffusionTransformer
from dparallel.rules.rules import RULES


@torch.no_grad()
def infill_one(model: DiffusionTransformer, canvas: Sequence[int], decoding: DecodingConfig) -> Generation:
    """Fill the masked positions of a canvas (L,) as `infill` does with batch size 1, without sampling."""
    assert decoding.temperature == 0
    assert decoding.cache == "none"
    mask, tokens = model.config.mask_token_id, list(canvas)
    whole, length = RULES[decoding.rule].whole_response, decoding.block_length
    gaps = [place for place, token in enumerate(tokens) if token == mask]

    # Blocks of canvas positions: a gap ends at a given token, a block when it is full or its gap ends.
    blocks: list[list[int]] = []
    for place in gaps:
        begins = place - 1 not in gaps or len(blocks[-1]) == length
        if (begins and not whole) or not blocks:
            blocks.append([])
        blocks[-1].append(place)
    length = len(gaps) if whole else length

    commit_step: dict[int, int] = {}
    confidence: dict[int, float] = {}
    distribution: dict[int, torch.Tensor] = {}  # (V,) as of the last reading
    opened_at = [0]  # forward pass at which each open block was opened
    nfe = 0
    while mask in tokens:
        # (a) One forward pass, read at the masked positions of open blocks. Number: block * length + place.
        logits = model(torch.tensor([tokens], device=model.device))[0]
        place_of = {
            number * length + index: place
            for number, block in enumerate(blocks[: len(opened_at)])
            for index, place in enumerate(block)
            if tokens[place] == mask
        }
        masked, reading = list(place_of), {}
        for i in masked:
            now = probabilities(logits[place_of[i]], model, decoding)
            reading[i] = read(now, distribution.get(i), mask)
            distribution[i] = now
        if RULES[decoding.rule].needs_weights:
            for i in masked:
                final = final_probability(model, reading[i], i, masked, length)
                reading[i] = reading[i]._replace(final=final)

        # (b) Commit what the rule selects and the best position; the first block with masks advances.
        ranking = rank(decoding.rule, reading)
        commit = set(selected(decoding, reading, ranking, nfe - opened_at[-1]))
        if not whole:
            commit.add(ranking[0])
            first = masked[0] // length
            if all(i // length != first for i in commit):
                commit.add(next(i for i in ranking if i // length == first))
        for i in commit:
            place = place_of[i]
            tokens[place], commit_step[place] = reading[i].token, nfe
            confidence[place] = reading[i].probability
        nfe += 1

        # (c) Open one more block. Positions that a short block lacks count as committed.
        left = sum(tokens[place] == mask for place in blocks[len(opened_at) - 1])
        if (length - left) / length >= (decoding.block_add_threshold or 1) and len(opened_at) < len(blocks):
            opened_at.append(nfe)

    filled = [tokens[place] for place in gaps]
    return Generation(
        filled,
        [commit_step[place] for place in gaps],
        [confidence[place] for place in gaps],
        nfe,
        sum(token not in model.config.end_token_ids for token in filled),
    )
