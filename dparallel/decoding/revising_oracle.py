"""The reference decoder of the mode `revising`, as slow and simple as `oracle`, whose forward pass it shares.

Legend: V vocabulary, D hidden size.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.canvas import Generation
from dparallel.decoding.oracle import (
    KeyValues,
    fill,
    final_probability,
    first_end,
    forward,
    length_of,
    probabilities,
    rank,
    read,
    selected,
)
from dparallel.models.backbone import DiffusionTransformer
from dparallel.rules.rules import RULES


@torch.no_grad()
def revise_one(
    model: DiffusionTransformer,
    prompt: Sequence[int],
    decoding: DecodingConfig,
    stop: Callable[[Sequence[int]], int | None] | None = None,
) -> Generation:
    """Decode one response as `generate` does with mode 'revising' and batch size 1, without sampling."""
    assert decoding.revises
    assert decoding.temperature == 0
    assert decoding.final_threshold is not None
    mask, ends, length = model.config.mask_token_id, model.config.end_token_ids, decoding.block_length
    response = [mask] * decoding.gen_length
    commit_step = [-1] * decoding.gen_length
    confidence = [0.0] * decoding.gen_length
    memory: KeyValues = [{} for _ in model.layers]
    nfe = 0
    stopped_after: int | None = None

    for start in range(0, decoding.gen_length, length):
        block = range(start, start + length)
        opened_at = nfe
        sureness: dict[int, float] = {}  # of the committed tokens of the block, by the last forward pass
        distribution: dict[int, Tensor] = {}  # (V,) as of the last forward pass, by response position
        further = 0  # forward passes over the block without masks

        while True:
            # (a) One forward pass, in which a committed token of the block counts as far as it is sure.
            recomputed = _recomputed(model, len(prompt), decoding, start, refresh=nfe == opened_at)
            soft = {len(prompt) + i: _soft(model, response[i], sure) for i, sure in sureness.items()}
            logits = forward(model, [*prompt, *response], recomputed, memory, soft)
            reading = {}
            for i in block:
                now = probabilities(logits[len(prompt) + i], model, decoding)
                reading[i] = read(now, distribution.get(i), mask)
                distribution[i] = now

            # (b) Commit what the rule selects of the masked positions, at least the best one.
            masked = {i: reading[i] for i in block if response[i] == mask}
            if RULES[decoding.rule].needs_weights:
                left = [*masked]
                masked = {
                    i: one._replace(final=final_probability(model, one, i, left, length))
                    for i, one in masked.items()
                }
            best_first = rank(decoding.rule, masked)
            new = {*best_first[:1], *selected(decoding, masked, best_first, nfe - opened_at)}

            # (c) Earlier tokens of the block become what is predicted now.
            changed = [i for i in block if i in new or response[i] not in (mask, reading[i].token)]
            for i in changed:
                response[i], confidence[i] = reading[i].token, reading[i].probability
                commit_step[i] = nfe
            sureness = {i: reading[i].probability for i in block if response[i] != mask}
            nfe += 1

            # (d) The block is final when it is sure, when nothing changes, or after so many further passes.
            if any(response[i] == mask for i in block):
                continue
            sure = all(each.probability >= decoding.final_threshold for each in reading.values())
            if sure or not changed or further == decoding.revision_passes:
                break
            further += 1

        # The row ends at an end token or at a stop in final blocks.
        whole = response[: start + length]
        end = first_end(whole, ends)
        if decoding.stop_at_eos and stop is not None:
            stopped_after = stop(whole if end is None else whole[:end])
        if decoding.stop_at_eos and (end is not None or stopped_after is not None):
            break

    fill(response, commit_step, mask, ends, nfe)
    num_tokens = length_of(response, ends, stopped_after)
    return Generation(response, commit_step, confidence, nfe, num_tokens)


def _recomputed(
    model: DiffusionTransformer, prompt_length: int, decoding: DecodingConfig, start: int, refresh: bool
) -> list[int]:
    """Canvas positions computed by a forward pass for the block at `start`; the others keep their keys and
    values. Models that predict the next token compute the position before the block as well."""
    length = prompt_length + decoding.gen_length
    first = max(0, prompt_length + start - int(model.config.predicts_next))
    if decoding.cache == "none" or refresh:
        first, end = 0, length
    elif decoding.cache == "prefix":
        end = length
    else:
        end = prompt_length + start + decoding.block_length
    return list(range(first, end))


def _soft(model: DiffusionTransformer, token: int, sure: float) -> Tensor:
    """The embedding (D,) of a token of probability `sure`: mixed with the mask's, of the mixed norm.

    Probabilities count in steps of 1 / 128.
    """
    sure = round(sure * 128) / 128
    table = model.embedding.weight
    own, mask = table[token].double(), table[model.config.mask_token_id].double()
    mixed = sure * own + (1 - sure) * mask
    norm = sure * own.norm() + (1 - sure) * mask.norm()
    return (mixed / mixed.norm() * norm).to(table.dtype)
