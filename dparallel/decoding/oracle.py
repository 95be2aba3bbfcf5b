"""A slow and simple reference decoder for tests of `generate`: one row, plain lists, no optimizations.

Written from the definitions, sharing no decoding code with `generate`, so that models, GPUs and speed-ups can
be checked against it. Each forward pass computes logits for all recomputed positions; softmax and entropy are
computed in float64. An exact cache is not used; its content is recomputed.

Legend: L canvas length, n positions recomputed, V vocabulary, D hidden size, H query and E key/value heads.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.canvas import Generation
from dparallel.models.backbone import DiffusionTransformer, Layer
from dparallel.rules.rules import RULES

# Per layer: key and value, each (E, head size), by canvas position.
KeyValues = list[dict[int, tuple[Tensor, Tensor]]]


class Reading(NamedTuple):
    """Prediction of a forward pass for a masked position."""

    token: int  # the most likely token, excluding the mask token
    probability: float  # of that token, over the full vocabulary
    doubt: float  # probability of all other tokens; resolves probabilities that round to 1
    runner_up: float  # probability of the second most likely token, excluding the mask token
    entropy: float  # nats, over the full vocabulary
    drift: float  # KL(now || previous reading), nats; infinite at the first reading
    final: float = torch.nan  # by the model's own commit rule, the probability that the token is final


@torch.no_grad()
def decode_one(
    model: DiffusionTransformer,
    prompt: Sequence[int],
    decoding: DecodingConfig,
    stop: Callable[[Sequence[int]], int | None] | None = None,
) -> Generation:
    """Decode one response as `generate` does with batch size 1.

    Raises:
        ValueError: `decoding.temperature` is above 0, or the mode is `revising` (see `revising_oracle`).
    """
    if decoding.revises:
        raise ValueError(f"mode={decoding.mode!r}: use revising_oracle.revise_one")
    if decoding.temperature > 0:
        raise ValueError(
            f"temperature={decoding.temperature}: the oracle draws no tokens; set temperature to 0"
        )
    mask, ends = model.config.mask_token_id, model.config.end_token_ids
    length = decoding.block_length
    response = [mask] * decoding.gen_length
    commit_step = [-1] * decoding.gen_length
    confidence = [0.0] * decoding.gen_length
    distribution: dict[int, Tensor] = {}  # (V,) as of the last reading, by response position
    memory: KeyValues = [{} for _ in model.layers]
    opened_at = [0]  # forward pass at which each open block was opened
    nfe = 0
    ended = False
    stopped_after: int | None = None

    while mask in response and not ended:
        blocks = [response[start : start + length] for start in range(0, len(response), length)]
        share = [(length - block.count(mask)) / length for block in blocks]

        # (a) Find the fully active blocks; (b) open one more. Sequential: both thresholds are 1.
        fully_active = [
            k == 0 or share[k - 1] >= (decoding.decoded_token_threshold or 1) for k in range(len(blocks))
        ]
        end_seen = (decoding.stop_at_eos or decoding.looks_back) and first_end(response, ends) is not None
        last = len(opened_at) - 1
        if share[last] >= (decoding.block_add_threshold or 1) and last + 1 < len(blocks) and not end_seen:
            opened_at.append(nfe)
        in_use = len(opened_at) * length
        if mask not in response[:in_use]:
            break  # no block opens after an end token

        # (c) One forward pass, read at the masked positions of open blocks.
        masked = [i for i in range(in_use) if response[i] == mask]
        canvas = [*prompt, *(response[:in_use] if decoding.looks_back else response)]
        before = int(model.config.predicts_next)
        recomputed = _recomputed(decoding, len(prompt), commit_step, opened_at, nfe, before)
        if decoding.cache in ("none", "exact"):
            seen = _seen(decoding, len(prompt), len(canvas)).to(model.device)
            logits = dict(enumerate(model(torch.tensor([canvas], device=model.device), seen)[0]))
        else:
            logits = forward(model, canvas, recomputed, memory)
        reading = {}
        for i in masked:
            now = probabilities(logits[len(prompt) + i], model, decoding)
            reading[i] = read(now, distribution.get(i), mask)
            distribution[i] = now
        if RULES[decoding.rule].needs_weights:
            reading = {
                i: one._replace(final=final_probability(model, one, i, masked, length))
                for i, one in reading.items()
            }

        # (d) Commit what the rule selects, and the best position except in the pipeline; (e) the first fully
        # active block commits a token, in the pipeline each fully active block.
        ranking = rank(decoding.rule, reading)
        forwards_of_block = nfe - opened_at[-1]
        commit = set(selected(decoding, reading, ranking, forwards_of_block))
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

        # (f) d3LLM's early stop: everything behind the first end token becomes the end-of-sequence token.
        if decoding.eos_fill == "immediate" and (end := first_end(response, ends)) is not None:
            for i in (i for i in range(end + 1, len(response)) if response[i] != ends[0]):
                response[i], confidence[i], commit_step[i] = ends[0], 0.0, nfe - 1

        # The row ends at an end token when all tokens before it are committed, or at a stop.
        complete = response.index(mask) if mask in response else len(response)
        end = first_end(response[:complete], ends)
        ended = decoding.stop_at_eos and end is not None
        if stop is not None and decoding.stop_at_eos:
            stopped_after = stop(response[:complete] if end is None else response[:end])
            ended = ended or stopped_after is not None

    fill(response, commit_step, mask, ends, nfe)
    num_tokens = length_of(response, ends, stopped_after)
    return Generation(response, commit_step, confidence, nfe, num_tokens)


def fill(
    response: list[int], commit_step: list[int], mask: int, end_token_ids: Sequence[int], nfe: int
) -> None:
    """Commit an end token, by the last forward pass, wherever the response still has a mask."""
    for i, token in enumerate(response):
        if token == mask:
            response[i], commit_step[i] = end_token_ids[0], nfe - 1


def length_of(response: list[int], end_token_ids: Sequence[int], stopped_after: int | None) -> int:
    """Tokens up to and including the first end token, or those before a stop."""
    end = first_end(response, end_token_ids)
    num_tokens = len(response) if end is None else end + 1
    return num_tokens if stopped_after is None else min(num_tokens, stopped_after)


def probabilities(logits: Tensor, model: DiffusionTransformer, decoding: DecodingConfig) -> Tensor:
    """Probability of each token (V,), in float64; 0 for a suppressed one."""
    logits = logits.double()
    if decoding.suppress_eos:
        logits[model.config.eos_token_id] = -torch.inf
    return logits.softmax(-1)


def first_end(response: list[int], end_token_ids: Sequence[int]) -> int | None:
    return next((i for i, token in enumerate(response) if token in end_token_ids), None)


def _seen(decoding: DecodingConfig, prompt_length: int, length: int) -> Tensor:
    """Attention pattern of the canvas: which positions each position attends to, (1, L, L) bool."""
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


def rank(rule: str, reading: dict[int, Reading]) -> list[int]:
    """Positions from best to worst; ties in order of position."""
    return sorted(reading, key=lambda i: DEFINITIONS[rule].cost(reading[i]))


def selected(
    decoding: DecodingConfig, reading: dict[int, Reading], ranking: list[int], forwards_of_block: int
) -> list[int]:
    """The positions in `ranking` that the rule selects."""
    fits = DEFINITIONS[decoding.rule].fits([reading[i] for i in ranking], decoding, forwards_of_block)
    return [i for i, chosen in zip(ranking, fits, strict=True) if chosen]


class Definition(NamedTuple):
    """A rule: readings are ranked by `cost`, the lowest first, and `fits` says which of them it selects.

    `fits` is called with the ranked readings, the settings, and the forward passes since the block opened.
    """

    cost: Callable[[Reading], float]
    fits: Callable[[list[Reading], DecodingConfig, int], list[bool]]


def every(fits: Callable[..., bool]) -> Callable[[list[Reading], DecodingConfig, int], list[bool]]:
    """Select each reading for which `fits(reading, **parameters)` is true."""
    return lambda ranked, decoding, forwards: [fits(each, **decoding.parameters) for each in ranked]


def most(fits: Callable[..., bool]) -> Callable[[list[Reading], DecodingConfig, int], list[bool]]:
    """Select as many readings, the best first, as `fits(readings, **parameters)` allows."""

    def select(ranked: list[Reading], decoding: DecodingConfig, forwards: int) -> list[bool]:
        sizes = range(1, len(ranked) + 1)
        n = max((size for size in sizes if fits(ranked[:size], **decoding.parameters)), default=0)
        return [place < n for place in range(len(ranked))]

    return select


def _even(ranked: list[Reading], decoding: DecodingConfig, forwards: int) -> list[bool]:
    """LLaDA's schedule: the same number in each step, one more in the first ones."""
    steps = (decoding.steps or 0) * decoding.block_length // decoding.gen_length
    quota, extra = divmod(decoding.block_length, steps)
    return [place < quota + (forwards < extra) for place in range(len(ranked))]


def _dream(ranked: list[Reading], decoding: DecodingConfig, forwards: int) -> list[bool]:
    """Dream's schedule: a share of the masks, at the last step all of them."""
    steps = decoding.steps or 1
    if forwards >= steps - 1:
        return [True] * len(ranked)
    time = torch.linspace(1, 1e-3, steps + 1)  # float32, as in Dream's code
    count = int(len(ranked) * (1 - time[forwards + 1] / time[forwards]))
    return [place < count for place in range(len(ranked))]


def doubt(one: Reading) -> float:
    return one.doubt


def entropy(one: Reading) -> float:
    return one.entropy


def closeness(one: Reading) -> float:
    """1 - the lead over the second most likely token."""
    return one.doubt + one.runner_up


# One line for each rule in `rules.rules.RULES`.
DEFINITIONS: dict[str, Definition] = {
    "steps": Definition(doubt, _even),
    "confidence": Definition(doubt, every(lambda one, threshold: one.probability >= threshold)),
    "entropy": Definition(entropy, every(lambda one, threshold: one.entropy <= threshold)),
    "entropy_budget": Definition(entropy, most(lambda n, threshold: sum(map(entropy, n)) <= threshold)),
    "entropy_bound": Definition(entropy, most(lambda n, threshold: sum(map(entropy, n[:-1])) <= threshold)),
    "frechet": Definition(doubt, most(lambda n, threshold: sum(map(doubt, n)) + n[-1].doubt < 1 - threshold)),
    "factor": Definition(doubt, most(lambda n, threshold: (len(n) + 1) * n[-1].doubt < threshold)),
    "contiguous": Definition(
        lambda one: 0,  # in order of position
        most(lambda n, threshold: all(one.probability >= threshold for one in n)),
    ),
    "margin": Definition(closeness, every(lambda one, threshold: 1 - closeness(one) >= threshold)),
    "stability": Definition(
        doubt,
        every(
            lambda one, threshold, stability_threshold: (
                one.probability >= threshold and one.drift <= stability_threshold
            )
        ),
    ),
    "learned": Definition(lambda one: -one.final, every(lambda one, threshold: one.final >= threshold)),
    "dream_entropy": Definition(entropy, _dream),
    "dream_maskgit_plus": Definition(doubt, _dream),
    "dream_topk_margin": Definition(closeness, _dream),
}


def read(now: Tensor, before: Tensor | None, mask: int) -> Reading:
    """Compare probabilities `now` (V,) with those of the previous reading, `before` (V,)."""
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


def final_probability(
    model: DiffusionTransformer, one: Reading, i: int, masked: list[int], length: int
) -> float:
    """The probability, by the model's own commit rule, that a reading's token is the final one."""
    block = [j for j in masked if j // length == i // length]
    values = [
        math.log(max(one.doubt, 1e-12)),
        math.log(max(one.entropy, 1e-12)),
        math.log(max(one.runner_up, 1e-12)),
        i % length / length,
        1 - len(block) / length,
        sum(j < i for j in block) / length,
    ]
    for place, (weight, bias) in enumerate(model.commit_rule.weights.layers):
        values = [math.tanh(value) for value in values] if place else values
        values = [
            sum(a * b for a, b in zip(row, values, strict=True)) + add
            for row, add in zip(weight.tolist(), bias.tolist(), strict=True)
        ]
    logit = values[0]  # of either sign exp could overflow
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def _recomputed(
    decoding: DecodingConfig,
    prompt_length: int,
    commit_step: list[int],
    opened_at: list[int],
    nfe: int,
    before: int = 0,
) -> list[int]:
    """Canvas positions computed by forward pass `nfe`; the others keep their keys and values.

    Args:
        before: number of positions to the left of a block that are computed with it: 1 for models that
            predict the next token, else 0.
    """
    everything = list(range(prompt_length + decoding.gen_length))
    if decoding.mode == "sequential":
        refresh = nfe == opened_at[-1]
    else:
        refresh = nfe % (decoding.refresh_every or 1) == 0
    if decoding.cache == "none" or refresh:
        return everything
    live: set[int] = set()  # canvas positions of open blocks that are incomplete or not settled
    for k in range(len(opened_at)):
        steps = commit_step[k * decoding.block_length : (k + 1) * decoding.block_length]
        if -1 in steps or nfe <= max(steps) + (decoding.settle_rounds or 0):
            start = prompt_length + k * decoding.block_length
            live.update(range(max(0, start - before), start + decoding.block_length))
    return sorted(live) if decoding.cache == "dual" else everything[min(live) :]


def forward(
    model: DiffusionTransformer,
    canvas: list[int],
    recomputed: list[int],
    memory: KeyValues,
    soft: Mapping[int, Tensor] | None = None,
) -> dict[int, Tensor]:
    """Logits (V,) of the recomputed positions, whose keys and values in `memory` are replaced.

    `soft` has the embeddings (D,) of positions that are not computed with those of their tokens.
    """
    theta = model.config.rope_theta
    hidden = model.embedding(torch.tensor([canvas[i] for i in recomputed], device=model.device))  # (n, D)
    for index, position in enumerate(recomputed):
        if soft is not None and position in soft:
            hidden[index] = soft[position]
    for layer, stored in zip(cast(Iterable[Layer], model.layers), memory, strict=True):
        attention = layer.attention
        normed = layer.attention_norm(hidden)
        split = (len(recomputed), -1, attention.head_size)
        query = attention.q_norm(attention.q_proj(normed).view(split))  # (n, H, head size)
        key = attention.k_norm(attention.k_proj(normed).view(split))  # (n, E, head size)
        query, key = _rotate(query, recomputed, theta), _rotate(key, recomputed, theta)
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
    if model.config.predicts_next:  # position i - 1 predicts token i; the first position predicts itself
        return {i: logits[max(0, i - 1)] for i in recomputed if max(0, i - 1) in logits}
    return logits


def _rotate(heads: Tensor, positions: list[int], theta: float) -> Tensor:
    """Rotate (n, heads, head size) by the angles of the positions; channel c pairs with c + half."""
    half = heads.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float32, device=heads.device) / half)
    angle = torch.tensor(positions, device=heads.device)[:, None, None] * frequency  # (n, 1, half)
    first, second = heads.float().chunk(2, dim=-1)
    turned = [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()]
    return torch.cat(turned, dim=-1).to(heads.dtype)
