"""The slow, obvious decoder that `generate` must equal: one row, plain lists, nothing clever.

Written from the definitions and sharing no decoding code with `generate`, so that a model, a GPU or a
new speed-up can be checked against it. Every forward gives logits for all it recomputes; softmax and
entropy are in float64.

An exact cache is not used: what it must not change is computed anew.

Legend: L canvas length, n positions recomputed, V vocabulary, D hidden size, H query and E key/value heads.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple, cast

import torch
from torch import Tensor

from dparallel.config.decoding import DecodingConfig
from dparallel.config.rules import RULES
from dparallel.decoding.canvas import Generation
from dparallel.models.backbone import DiffusionTransformer, Layer

# Of each layer: the key and the value, (E, head size) each, of every canvas position.
KeyValues = list[dict[int, tuple[Tensor, Tensor]]]


class Reading(NamedTuple):
    """What one forward says about one masked position."""

    token: int  # the likeliest one other than the mask
    probability: float  # of that token, over the full vocabulary
    doubt: float  # probability of all others, which tells apart what is sure to sixteen digits
    runner_up: float  # probability of the next likeliest token other than the mask
    entropy: float  # nats, full vocabulary
    drift: float  # KL(now || when last read), nats; infinite at the first reading


@torch.no_grad()
def decode_one(model: DiffusionTransformer, prompt: Sequence[int], decoding: DecodingConfig) -> Generation:
    """Decode one response as `generate` does, at batch size 1 and without any of its speed.

    Raises:
        ValueError: `decoding.temperature` above 0.
    """
    if decoding.temperature > 0:
        raise ValueError(
            f"temperature={decoding.temperature}: the oracle draws no tokens; set temperature to 0"
        )
    mask, ends = model.config.mask_token_id, model.config.end_token_ids
    length = decoding.block_length
    response = [mask] * decoding.gen_length
    commit_step = [-1] * decoding.gen_length
    confidence = [0.0] * decoding.gen_length
    distribution: dict[int, Tensor] = {}  # (V,) as last read, by response position
    memory: KeyValues = [{} for _ in model.layers]
    opened_at = [0]  # the forward at which each open block opened
    nfe = 0
    ended = False

    while mask in response and not ended:
        blocks = [response[start : start + length] for start in range(0, len(response), length)]
        share = [(length - block.count(mask)) / length for block in blocks]

        # (a) Which blocks are fully active; (b) open one more. Sequential: both thresholds are 1.
        fully_active = [
            k == 0 or share[k - 1] >= (decoding.decoded_token_threshold or 1) for k in range(len(blocks))
        ]
        end_seen = (decoding.stop_at_eos or decoding.looks_back) and _first_end(response, ends) is not None
        last = len(opened_at) - 1
        if share[last] >= (decoding.block_add_threshold or 1) and last + 1 < len(blocks) and not end_seen:
            opened_at.append(nfe)
        in_use = len(opened_at) * length
        if mask not in response[:in_use]:
            break  # an end token keeps the rest from opening

        # (c) One forward, read wherever an open block is masked.
        masked = [i for i in range(in_use) if response[i] == mask]
        canvas = [*prompt, *(response[:in_use] if decoding.looks_back else response)]
        before = int(model.config.predicts_next)
        recomputed = _recomputed(decoding, len(prompt), commit_step, opened_at, nfe, before)
        if decoding.cache in ("none", "exact"):
            seen = _seen(decoding, len(prompt), len(canvas)).to(model.device)
            logits = dict(enumerate(model(torch.tensor([canvas], device=model.device), seen)[0]))
        else:
            logits = _forward(model, canvas, recomputed, memory)
        reading = {}
        for i in masked:
            now = logits[len(prompt) + i].double().softmax(-1)
            reading[i] = _read(now, distribution.get(i), mask)
            distribution[i] = now

        # (d) What the rule commits, the best in any case but that of the pipeline; (e) the first fully
        # active block gets a token, in the pipeline each of them.
        ranking = _ranking(decoding.rule, reading)
        forwards_of_block = nfe - opened_at[-1]
        commit = set(_chosen(decoding, reading, ranking, forwards_of_block))
        if not RULES[decoding.rule].whole_response:
            late = list(dict.fromkeys(i // length for i in masked if fully_active[i // length]))
            if decoding.mode != "pipelined":
                commit.add(ranking[0])
                late = late[:1]
            for block in late:
                if all(i // length != block for i in commit):
                    commit.add(next(i for i in ranking if i // length == block))
        for i in commit:
            response[i], confidence[i], commit_step[i] = reading[i].token, reading[i].probability, nfe
        nfe += 1

        # An end token with everything before it committed ends the row.
        complete = response.index(mask) if mask in response else len(response)
        ended = decoding.stop_at_eos and _first_end(response[:complete], ends) is not None

    for i, token in enumerate(response):
        if token == mask:
            response[i], commit_step[i] = ends[0], nfe - 1
    end = _first_end(response, ends)
    return Generation(response, commit_step, confidence, nfe, len(response) if end is None else end + 1)


def _first_end(response: list[int], end_token_ids: Sequence[int]) -> int | None:
    return next((i for i, token in enumerate(response) if token in end_token_ids), None)


def _seen(decoding: DecodingConfig, prompt_length: int, length: int) -> Tensor:
    """Which canvas positions each one attends to, (1, L, L) bool."""
    seen = torch.ones(1, length, length, dtype=torch.bool)
    for query in range(length):
        end = length
        if decoding.mode == "autoregressive":
            end = query + 1
        elif decoding.mode == "pipelined" and query < prompt_length:
            end = prompt_length
        elif decoding.mode == "pipelined":
            block = (query - prompt_length) // decoding.block_length
            end = prompt_length + (block + 1) * decoding.block_length
        seen[0, query, end:] = False
    return seen


def _ranking(rule: str, reading: dict[int, Reading]) -> list[int]:
    """Positions, best first; of equals the first."""
    if rule in ("entropy", "entropy_budget", "dream_entropy"):
        return sorted(reading, key=lambda i: reading[i].entropy)
    if rule in ("margin", "dream_topk_margin"):
        return sorted(reading, key=lambda i: reading[i].doubt + reading[i].runner_up)
    return sorted(reading, key=lambda i: reading[i].doubt)


def _chosen(
    decoding: DecodingConfig, reading: dict[int, Reading], ranking: list[int], forwards_of_block: int
) -> list[int]:
    """Positions that meet the rule, of those in `ranking`."""
    threshold = decoding.threshold or 0.0  # None for `steps` alone
    match decoding.rule:
        case "steps":
            steps = (decoding.steps or 0) * decoding.block_length // decoding.gen_length
            every, more = divmod(decoding.block_length, steps)
            return ranking[: every + (forwards_of_block < more)]
        case "confidence":
            return [i for i in ranking if reading[i].probability >= threshold]
        case "entropy":
            return [i for i in ranking if reading[i].entropy <= threshold]
        case "entropy_budget":
            sums = accumulate(reading[i].entropy for i in ranking)
            return [i for i, total in zip(ranking, sums, strict=True) if total <= threshold]
        case "margin":
            return [i for i in ranking if 1 - reading[i].doubt - reading[i].runner_up >= threshold]
        case "stability":
            calm = decoding.stability_threshold or 0.0
            return [i for i in ranking if reading[i].probability >= threshold and reading[i].drift <= calm]
        case "dream_entropy" | "dream_maskgit_plus" | "dream_topk_margin":
            steps = decoding.steps or 1
            if forwards_of_block >= steps - 1:
                return ranking
            time = torch.linspace(1, 1e-3, steps + 1)  # float32, as Dream's own
            now, then = time[forwards_of_block], time[forwards_of_block + 1]
            return ranking[: int(len(ranking) * (1 - then / now))]
    raise ValueError(f"rule={decoding.rule!r} is not known to the oracle: write it here first")


def _read(now: Tensor, before: Tensor | None, mask: int) -> Reading:
    """`now` and `before` are (V,) probabilities."""
    allowed = now.clone()
    allowed[mask] = -1
    token = int(allowed.argmax())
    rivals = now.clone()
    rivals[token] = 0
    drift = torch.inf if before is None else float((torch.xlogy(now, now) - torch.xlogy(now, before)).sum())
    return Reading(
        token=token,
        probability=float(now[token]),
        doubt=float(rivals.sum()),
        runner_up=float(allowed.topk(2).values[1]),
        entropy=float(torch.special.entr(rivals).sum() - now[token] * torch.log1p(-rivals.sum())),
        drift=drift,
    )


def _recomputed(
    decoding: DecodingConfig,
    prompt_length: int,
    commit_step: list[int],
    opened_at: list[int],
    nfe: int,
    before: int = 0,
) -> list[int]:
    """Canvas positions that forward `nfe` computes; the others keep the keys and values they have.

    `before` positions left of a block belong to it: where a model predicts the next token, one.
    """
    everything = list(range(prompt_length + decoding.gen_length))
    if decoding.mode == "sequential":
        refresh = nfe == opened_at[-1]
    else:
        refresh = nfe % (decoding.refresh_every or 1) == 0
    if decoding.cache == "none" or refresh:
        return everything
    live: set[int] = set()  # canvas positions of the open blocks that have masks or still settle
    for k in range(len(opened_at)):
        steps = commit_step[k * decoding.block_length : (k + 1) * decoding.block_length]
        if -1 in steps or nfe <= max(steps) + (decoding.settle_rounds or 0):
            start = prompt_length + k * decoding.block_length
            live.update(range(max(0, start - before), start + decoding.block_length))
    return sorted(live) if decoding.cache == "dual" else everything[min(live) :]


def _forward(
    model: DiffusionTransformer, canvas: list[int], recomputed: list[int], memory: KeyValues
) -> dict[int, Tensor]:
    """Logits (V,) of the recomputed positions, which replace their keys and values in `memory`."""
    theta = model.config.rope_theta
    hidden = model.embedding(torch.tensor([canvas[i] for i in recomputed], device=model.device))  # (n, D)
    for layer, stored in zip(cast(Iterable[Layer], model.layers), memory, strict=True):
        attention = layer.attention
        normed = layer.attention_norm(hidden)
        split = (len(recomputed), -1, attention.head_size)
        query = _rotate(attention.q_proj(normed).view(split), recomputed, theta)  # (n, H, head size)
        key = _rotate(attention.k_proj(normed).view(split), recomputed, theta)  # (n, E, head size)
        value = attention.v_proj(normed).view(split)
        for index, position in enumerate(recomputed):
            stored[position] = key[index], value[index]
        keys = torch.stack([stored[i][0] for i in range(len(canvas))])  # (L, E, head size)
        values = torch.stack([stored[i][1] for i in range(len(canvas))])
        group = attention.heads // attention.kv_heads  # query heads that share a key/value head
        scores = torch.einsum("nhd,lhd->hnl", query, keys.repeat_interleave(group, 1))
        weights = (scores / attention.head_size**0.5).softmax(-1)
        mixed = torch.einsum("hnl,lhd->nhd", weights, values.repeat_interleave(group, 1))
        hidden = hidden + attention.o_proj(mixed.flatten(1))
        hidden = hidden + layer.feed_forward(layer.feed_forward_norm(hidden))
    logits = dict(zip(recomputed, model.lm_head(model.norm(hidden)), strict=True))
    if model.config.predicts_next:  # position i - 1 speaks for i, and the first one for itself
        return {i: logits[max(0, i - 1)] for i in recomputed if max(0, i - 1) in logits}
    return logits


def _rotate(heads: Tensor, positions: list[int], theta: float) -> Tensor:
    """Turn (n, heads, head size) by the angles of its positions; channel c pairs with c + half."""
    half = heads.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float32, device=heads.device) / half)
    angle = torch.tensor(positions, device=heads.device)[:, None, None] * frequency  # (n, 1, half)
    first, second = heads.float().chunk(2, dim=-1)
    turned = [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()]
    return torch.cat(turned, dim=-1).to(heads.dtype)
