"""The merging stage: merge an adapter into its base model, and verify that both compute the same logits.

Legend: G response positions, L canvas length, N masked positions, V vocabulary.
"""

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from dparallel.config.experiment import MergingConfig
from dparallel.config.recipe import RecipeConfig
from dparallel.decoding.memory import free_bytes
from dparallel.distillation.commit_rule import fit_on
from dparallel.models.adapters import load_adapter
from dparallel.models.backbone import DiffusionConfig, DiffusionTransformer, rotary_tables
from dparallel.models.checkpoints import (
    choose_format,
    load_model,
    load_tokenizer,
    read_config,
    save_model,
)
from dparallel.models.commit_rule import write_commit_rule
from dparallel.models.defaults import write_defaults
from dparallel.models.loader import releasing_memory
from dparallel.models.lora import detach, fold, merged_weight
from dparallel.models.placement import empty_model
from dparallel.models.sizes import stored_bytes
from dparallel.rules.declaration import COMMIT_RULE
from dparallel.stages import lease
from dparallel.stages.files import naming_the_file
from dparallel.stages.manifest import Manifest, Stage, StageError, fingerprint, read_manifest, verify
from dparallel.stages.origin import Origin
from dparallel.trajectories import store

log = logging.getLogger(__name__)

ROOM = 1.25  # memory relative to the weights, for adapter, canvases and logits


class MergeError(RuntimeError):
    """The merged model's logits differ from those of base + adapter; the stage remains unfinished."""


@releasing_memory
def run_stage(
    config: MergingConfig, inputs: dict[str, str], out_dir: str | Path, origin: Origin | None = None
) -> Manifest:
    """Merge the adapter of `inputs["training"]` into `inputs["teacher"]`, verify the result, and save it.

    A student that was trained elsewhere has its adapter in `inputs["adapter"]` instead. The check compares
    logits on partly masked canvases of `config.check_prompts` trajectories of `inputs["trajectories"]`, or of
    random tokens for an adapter from elsewhere. The manifest contains two largest differences from base +
    adapter in float32: `max_logit_difference` of the merged model in float32, and
    `max_logit_difference_saved` of the saved model, whose weights are rounded to the teacher's dtypes.

    Args:
        origin: the run that the stage belongs to.

    Raises:
        LeaseHeldError: another run works in this folder.
        StageError: the adapter was trained on another teacher, or an input is damaged.
        AdapterError: the adapter does not fit the teacher.
        CheckpointError: the teacher has no original format to save in, or the disk is full.
        MergeError: the first difference is above `config.tolerance`, or the second one is, unless the
            teacher's dtype (bf16 or fp16) rounds the weights.
    """
    stage = Stage("merging", config, inputs, out_dir, origin)
    if done := stage.done:
        return done
    with lease.held(stage.folder):
        if done := stage.done:  # finished by another run meanwhile
            return done
        return _merge(config, inputs, stage)


def _merge(config: MergingConfig, inputs: dict[str, str], stage: Stage) -> Manifest:
    adapter, attention, canvases = _adapter_of(config, inputs)
    merged = merge_adapter(inputs["teacher"], adapter, stage.folder, config, attention, canvases)
    if config.commit_rule is not None:
        model, trained = load_model(stage.folder, roomy_device(stage.folder)), _recipe_of(inputs)
        write_commit_rule(stage.folder, fit_on(model, inputs["trajectories"], config.commit_rule, trained))
        merged.files.append(COMMIT_RULE)
    return stage.finish(
        files=merged.files,
        counts={"check_prompts": len(canvases)},
        metrics={
            "max_logit_difference": merged.difference,
            "max_logit_difference_saved": merged.saved_difference,
        },
        details={"dtype": merged.dtype, "format": merged.format},
    )


def _adapter_of(config: MergingConfig, inputs: dict[str, str]) -> tuple[Path, str | None, list[Tensor]]:
    """Folder of the student's adapter, its attention pattern, and canvases for the check."""
    model = read_config(inputs["teacher"])
    if "training" not in inputs:
        return Path(inputs["adapter"]), config.attention, random_canvases(model, config.check_prompts)
    training = verify(inputs["training"], "training")
    if training.inputs["teacher"] != fingerprint(inputs["teacher"]):
        raise StageError(
            f"the adapter in {inputs['training']} was trained on another teacher than {inputs['teacher']}: "
            "merge it into the one it was trained on"
        )
    rows = store.load(inputs["trajectories"]).slice(0, config.check_prompts).to_pylist()
    canvases = check_canvases(rows, model.mask_token_id)
    return Path(inputs["training"]) / "adapter", training.config["recipe"]["attention"], canvases


def _recipe_of(inputs: dict[str, str]) -> RecipeConfig | None:
    """The recipe of the student; None of an adapter that was trained elsewhere."""
    if "training" not in inputs:
        return None
    return RecipeConfig.model_validate(read_manifest(inputs["training"], "training").config["recipe"])


class Merged(NamedTuple):
    """A saved model: its files, and its largest differences from base + adapter, before and after saving."""

    files: list[str]
    difference: float
    saved_difference: float
    dtype: str
    format: str


def merge_adapter(
    teacher: str | Path,
    adapter: str | Path,
    folder: Path,
    config: MergingConfig,
    attention: str | None,
    canvases: Sequence[Tensor],
) -> Merged:
    """Merge an adapter into its base model, verify the result, and save it.

    Args:
        teacher: the base model.
        adapter: as in `load_adapter`.
        attention: attention pattern that the adapter was trained with; None for that of the base model.
        canvases: partly masked canvases (1, L), on which logits are compared.

    Raises:
        AdapterError, CheckpointError, MergeError: as `run_stage`.
    """
    # 1. Load base and adapter
    format = choose_format(config.format, teacher)
    base = load_model(teacher, roomy_device(teacher))
    student = load_adapter(base, adapter).eval()

    # 2. Merge in float32, and compare with the logits of base + adapter
    mask_token_id = base.config.mask_token_id
    expected = masked_logits(student, canvases, mask_token_id)
    merged, adapters = detach(student)
    merged.config.attention_pattern = attention or merged.config.attention_pattern
    merged.defaults = merged.commit_rule = None  # those of the teacher do not suit the student
    actual = masked_logits(merged, canvases, mask_token_id, adapters)
    difference = max_difference(expected, actual)
    if not difference <= config.tolerance:  # also catches NaN
        raise MergeError(
            f"merged logits differ from base + adapter by {difference:.3g} on {len(canvases)} prompts, "
            f"more than tolerance={config.tolerance}; the adapter may be too large for float32"
        )
    log.info("merged logits equal base + adapter within %.2g on %d prompts", difference, len(canvases))

    # 3. Save each matrix in its own dtype, and compare the logits of the saved model
    fold(adapters)
    device, dtype_name = merged.device, str(merged.dtype).removeprefix("torch.")
    rounds = any(torch.finfo(weight.dtype).bits < 32 for weight in merged.parameters())
    tokenizer = load_tokenizer(teacher)
    with naming_the_file(folder):
        files = save_model(merged, folder, tokenizer=tokenizer, format=format)
        write_defaults(folder, None)  # the layout in which the student's own ones will be added
    del base, student, merged, adapters  # keep only one model in memory
    saved = load_model(folder, device)
    saved_difference = max_difference(expected, masked_logits(saved, canvases, mask_token_id))
    limit = math.inf if rounds else config.tolerance
    if not saved_difference <= limit:
        raise MergeError(
            f"the model saved in {folder} ({dtype_name}) differs from base + adapter by "
            f"{saved_difference:.3g}, more than tolerance={config.tolerance}"
        )
    log.info("saved in %s, they differ from base + adapter by at most %.2g", dtype_name, saved_difference)
    return Merged(files, difference, saved_difference, dtype_name, format)


def roomy_device(path: str | Path) -> torch.device:
    """A GPU with enough memory for the model and the check, otherwise the CPU."""
    gpu = torch.device("cuda")
    if torch.cuda.is_available() and free_bytes(gpu) > merging_bytes(path):
        return gpu
    return torch.device("cpu")


def merging_bytes(path: str | Path) -> int:
    """Bytes of the stored model plus those of its largest part while it is merged in float64."""
    model = empty_model(read_config(path))
    widest = max(sum(weight.numel() for weight in part.parameters()) for part in parts(model))
    return int(ROOM * stored_bytes(path)) + 2 * torch.float64.itemsize * widest


def check_canvases(rows: Sequence[dict], mask_token_id: int) -> list[Tensor]:
    """One canvas (1, L) per trajectory, from lightly masked (at least one position) to fully masked."""
    rng = np.random.default_rng(0)
    canvases = []
    for index, row in enumerate(rows):
        response = np.array(row["response_ids"])
        count = -(-len(response) * (index + 1) // len(rows))
        response[rng.permutation(len(response))[:count]] = mask_token_id
        canvases.append(torch.from_numpy(np.concatenate([row["prompt_ids"], response]))[None])
    return canvases


def random_canvases(model: DiffusionConfig, count: int) -> list[Tensor]:
    """Canvases as of `check_canvases`, of tokens drawn at random: where no trajectories are at hand."""
    rng = np.random.default_rng(0)
    length = min(48, model.max_position_embeddings)
    tokens = np.delete(np.arange(model.vocab_size), model.mask_token_id)
    drawn = rng.choice(tokens, (count, length))
    prompt = length // 3
    rows = [{"prompt_ids": row[:prompt], "response_ids": row[prompt:]} for row in drawn]
    return check_canvases(rows, model.mask_token_id)


@torch.no_grad()
def masked_logits(
    model: nn.Module,
    canvases: Sequence[Tensor],
    mask_token_id: int,
    adapters: Mapping[nn.Parameter, Linear] | None = None,
) -> list[Tensor]:
    """Logits (N, V) at the masked positions of each canvas.

    The float32 weights are multiplied in float64, so that the comparison is not affected by the order of
    float32 sums. The model is copied to float64 part by part: a bf16 model would take four times its size.

    Args:
        adapters: merged in float32 into the copies of their matrices.
    """
    [whole] = (module for module in model.modules() if isinstance(module, DiffusionTransformer))
    config, device = whole.config, whole.device
    ids = [canvas.to(device) for canvas in canvases]
    positions = [torch.arange(canvas.shape[1], device=device) for canvas in ids]
    rotary = [rotary_tables(position, config.head_size, config.rope_theta) for position in positions]

    part = widened(whole.embedding, adapters)
    hidden = [part(canvas) for canvas in ids]  # (1, L, D) each
    for layer in whole.layers:
        part = widened(layer, adapters)
        hidden = [part(states, tables, None) for states, tables in zip(hidden, rotary, strict=True)]
    part = widened(whole.norm, adapters)
    hidden = [part(states) for states in hidden]
    part = widened(whole.lm_head, adapters)
    before = 1 if config.predicts_next else 0  # the previous position predicts a token
    reads = [(canvas[0] == mask_token_id).nonzero()[:, 0] - before for canvas in ids]
    return [part(states[0, read.clamp(min=0)]) for states, read in zip(hidden, reads, strict=True)]


def widened(part: nn.Module, adapters: Mapping[nn.Parameter, Linear] | None) -> nn.Module:
    """A float64 copy of a part of the model, with the adapters of its matrices merged in."""
    wide = copy.deepcopy(part)
    for weight, copied in zip(part.parameters(), wide.parameters(), strict=True):
        adapter = (adapters or {}).get(weight)
        copied.data = (weight if adapter is None else merged_weight(weight, adapter)).double()
    return wide


def parts(model: DiffusionTransformer) -> list[nn.Module]:
    """The model's parts in the order of computation; together they contain all weights."""
    return [model.embedding, *model.layers, model.norm, model.lm_head]


def max_difference(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    """The largest absolute difference between corresponding tensors."""
    return max((a - b).abs().max().item() for a, b in zip(expected, actual, strict=True))
