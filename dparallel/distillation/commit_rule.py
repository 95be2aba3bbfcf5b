"""Fit a commit rule: from what a model predicts on canvases of trajectories, whether a token is final.

An example is a masked position of the active block on a canvas of a recorded trajectory. Its label is whether
the model's most likely token there is the one that the trajectory committed in the end.

Legend: C canvases, P prompt length, L canvas length, l block length, N examples, F features.
"""

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dparallel.config.base import UserError, joined
from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import LEAST_TRAJECTORIES, CommitRuleConfig, TrajectoriesConfig
from dparallel.config.recipe import RecipeConfig
from dparallel.config.recipe_misfits import block_lengths
from dparallel.decoding.patterns import attention_levels
from dparallel.decoding.predictions import predict
from dparallel.distillation.data import check_tokens
from dparallel.models.backbone import DiffusionTransformer
from dparallel.models.commit_rule import CommitRule
from dparallel.rules.declaration import Context, Weights
from dparallel.rules.features import features, network
from dparallel.rules.rules import runner_up
from dparallel.stages.manifest import read_manifest
from dparallel.trajectories import store

log = logging.getLogger(__name__)

HELD_OUT = 5  # one trajectory in so many
STEPS, LEARNING_RATE, WEIGHT_DECAY = 400, 0.03, 1e-4
Row = Mapping[str, Any]  # of a trajectory shard


class Examples(NamedTuple):
    """Features, labels, and the model's probability of its most likely token."""

    features: Tensor  # (N, F) float64
    final: Tensor  # (N,) bool
    probability: Tensor  # (N,) float64


def misfit(
    config: CommitRuleConfig, recorded: TrajectoriesConfig, trained: RecipeConfig | None
) -> str | None:
    """Why no rule can be fitted on such trajectories, with the remedy; None if one can.

    Args:
        trained: recipe of the student that the rule is fitted for; None for another model.
    """
    decoding, stated = recorded.decoding, config.block_length
    if not recorded.has_steps:
        return (
            "imported responses without the steps at which tokens were committed: record trajectories, or "
            "import whole ones"
        )
    if decoding.revises:
        return (
            f"trajectories with mode={decoding.mode!r}, whose canvases held tokens where these have masks: "
            "record them with another mode"
        )
    if stated is not None and decoding.gen_length % stated:
        return (
            f"block_length={stated} does not divide trajectories of {decoding.gen_length} tokens: give one "
            "that does"
        )
    own = own_blocks(trained, decoding.gen_length)
    if own is not None and stated not in (None, own):
        return (
            f"block_length={stated} for a block-causal student that is trained and decoded in blocks of "
            f"{own}: leave it out"
        )
    return None


def own_blocks(trained: RecipeConfig | None, gen_length: int) -> int | None:
    """The block length that a block-causal student is decoded with: its last one, if they grow."""
    if trained is None or trained.attention != "block_causal":
        return None
    return max(block_lengths(trained, gen_length), default=None)


def fit_on(
    model: DiffusionTransformer,
    trajectories: str | Path,
    config: CommitRuleConfig,
    trained: RecipeConfig | None = None,
) -> CommitRule:
    """Fit the commit rule of a model on finished trajectories of its own, or of its teacher.

    Blocks are those that `config` states; else those of a block-causal student's recipe `trained`; else those
    of the trajectories.

    Raises:
        UserError: as `fit`; or the trajectories are missing, unfinished or damaged, or have no canvases that
            decoding meets.
    """
    manifest = read_manifest(trajectories, "trajectories")
    recorded = TrajectoriesConfig.model_validate(joined(manifest.config, manifest.how))
    if reason := misfit(config, recorded, trained):
        raise UserError(f"{trajectories}: {reason}")
    rows = store.load(trajectories).slice(0, config.trajectories).to_pylist()
    own = own_blocks(trained, recorded.decoding.gen_length)
    return fit(model, rows, config.block_length or own or recorded.decoding.block_length, config)


def fit(
    model: DiffusionTransformer, rows: Sequence[Row], block_length: int, config: CommitRuleConfig
) -> CommitRule:
    """Fit the commit rule of a model on trajectories.

    Args:
        rows: with the columns `prompt_ids`, `response_ids`, `commit_step` and `nfe`.
        block_length: that the model is decoded with; a divisor of the trajectories' length.

    Returns:
        The rule. Its `fitted` says on what it was fitted, and how well it does on held-out trajectories.

    Raises:
        UserError: there are fewer than 10 trajectories, they differ in length, blocks do not divide them, the
            model cannot read them, or it is causal.
    """
    if len(rows) < LEAST_TRAJECTORIES:
        raise UserError(f"{len(rows)} trajectories: give at least {LEAST_TRAJECTORIES}; some are held out")
    length, *others = sorted({len(row["response_ids"]) for row in rows})
    if others:
        raise UserError(f"trajectories of different lengths {[length, *others]}: give some of one length")
    prompts, responses = ([np.array(row[name]) for row in rows] for name in ("prompt_ids", "response_ids"))
    check_tokens(prompts, np.stack(responses), model.config)
    if length % block_length:
        raise UserError(
            f"block_length={block_length} does not divide trajectories of {length} tokens: give one that does"
        )
    if model.config.attention_pattern == "causal":
        raise UserError("a causal model commits one token per forward pass, and no rule: give another model")
    rng = np.random.default_rng(config.seed)
    held: list[Examples] = []
    fitted: list[Examples] = []
    for place, row in enumerate(rows):
        found = examples(model, row, block_length, rng.integers(0, row["nfe"], config.canvases))
        (held if place % HELD_OUT == HELD_OUT - 1 else fitted).append(found)
    train, test = _joined(fitted), _joined(held)
    weights = train_network(train, config.hidden, config.seed)
    quality = _quality(weights, test)
    log.info("commit rule of %d examples, on held-out ones: %s", len(train.final), quality)
    described = {**config.model_dump(mode="json"), "trajectories": len(rows), "block_length": block_length}
    return CommitRule(weights, {**described, "examples": len(train.final), **quality})


@torch.no_grad()
def examples(model: DiffusionTransformer, row: Row, block_length: int, steps: np.ndarray) -> Examples:
    """The examples of a trajectory on its canvases before the forward passes `steps` (C,)."""
    config, device = model.config, model.device
    response = torch.tensor(row["response_ids"], device=device)
    committed = torch.tensor(row["commit_step"], device=device) < torch.from_numpy(steps).to(device)[:, None]
    prompt = torch.tensor(row["prompt_ids"], device=device).expand(len(steps), -1)
    canvas = torch.cat([prompt, torch.where(committed, response, config.mask_token_id)], 1)  # (C, L)
    whole = committed.unflatten(1, (-1, block_length)).all(2)  # (C, K)
    active = (~whole).long().argmax(1)  # the first incomplete block of each
    offsets = active[:, None] * block_length + torch.arange(block_length, device=device)  # (C, l)
    masked = ~committed.gather(1, offsets)
    shape = {"gen_length": len(response), "block_length": block_length}
    decoding = DecodingConfig(
        **shape, mode="pipelined" if config.attention_pattern == "block_causal" else "sequential"
    )
    lengths = torch.full((len(steps),), prompt.shape[1], device=device)
    levels = attention_levels(decoding, lengths, canvas.shape[1])
    logits = model(canvas, logits_at=lengths[:, None] + offsets, levels=levels)  # (C, l, V)
    prediction = predict(logits, config.mask_token_id)
    context = Context(
        blocks=decoding.blocks,
        block_length=block_length,
        mask_token_id=config.mask_token_id,
        offsets=offsets,
    )
    second = runner_up(prediction.log_probability, config.mask_token_id)
    return Examples(
        features(prediction, second, masked, context)[masked].cpu(),
        (prediction.token == response[offsets])[masked].cpu(),
        prediction.probability.double()[masked].cpu(),
    )


def train_network(train: Examples, hidden: int, seed: int) -> Weights:
    """Minimize the log loss by Adam on all examples at once; takes seconds on a CPU.

    Args:
        hidden: units of the hidden layer; 0 for a logistic regression.
    """
    mean, spread = train.features.mean(0), train.features.std(0).clamp(min=1e-3)
    inputs, labels = (train.features - mean) / spread, train.final.double()
    generator = torch.Generator().manual_seed(seed)
    sizes = [inputs.shape[1], *([hidden] if hidden else []), 1]
    weights = Weights(
        tuple(
            (
                torch.randn(out, width, generator=generator, dtype=torch.float64) / width**0.5,
                torch.zeros(out, dtype=torch.float64),
            )
            for width, out in pairwise(sizes)
        )
    )
    parameters = [parameter.requires_grad_() for layer in weights.layers for parameter in layer]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(network(weights, inputs), labels).backward()
        optimizer.step()
        schedule.step()
    [(first, bias), *others] = [(weight.detach(), bias.detach()) for weight, bias in weights.layers]
    scaled = first / spread
    return Weights(((scaled, bias - scaled @ mean), *others))


def _quality(weights: Weights, test: Examples) -> dict[str, float]:
    """Share of final tokens, and the log loss of the rule and of the model's own probability."""
    final = test.final.double()
    mine = F.binary_cross_entropy_with_logits(network(weights, test.features), final)
    own = F.binary_cross_entropy(test.probability.clamp(1e-9, 1 - 1e-9), final)
    return {
        "final": round(float(final.mean()), 6),
        "log_loss": round(float(mine), 6),
        "log_loss_of_probability": round(float(own), 6),
    }


def _joined(parts: Sequence[Examples]) -> Examples:
    return Examples(*(torch.cat(column) for column in zip(*parts, strict=True)))
