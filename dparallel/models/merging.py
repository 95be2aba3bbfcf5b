"""The merging stage: a student that stands alone, proven equal to base + adapter at every merge.

Legend: G response positions, L canvas length, N masked positions, V vocabulary.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dparallel.config import MergingConfig
from dparallel.decoding.memory import free_bytes
from dparallel.manifest import Manifest, Stage, StageError, fingerprint, verify
from dparallel.models.backbone import DiffusionTransformer
from dparallel.models.checkpoints import (
    choose_format,
    load_model,
    load_tokenizer,
    read_config,
    save_model,
)
from dparallel.models.lora import load_adapter, merge
from dparallel.trajectories import store

logger = logging.getLogger(__name__)

ROOM = 1.25  # of the weights: what a forward takes beside them


class MergeError(RuntimeError):
    """The merged model does not compute what base + adapter computed; the stage stays unfinished."""


def run_stage(config: MergingConfig, inputs: dict[str, str], out_dir: str | Path) -> Manifest:
    """Merge the adapter of `inputs["training"]` into `inputs["teacher"]`, check, and save.

    The check compares logits on partly masked canvases of `config.check_prompts` trajectories of
    `inputs["trajectories"]`. Two largest differences from base + adapter in float32 go into the manifest:
    `max_logit_difference` of the merge, also in float32, and `max_logit_difference_saved` of the model
    read back from the folder, whose weights are rounded to the teacher's dtype.

    Raises:
        StageError: the adapter was trained on another teacher, or an input is damaged.
        AdapterError: the adapter does not fit the teacher.
        CheckpointError: the teacher has no original format to be saved in, or the disk no room.
        MergeError: the first difference is above `config.tolerance`, or the second one is though the
            teacher's dtype rounds nothing away (bf16 and fp16 do).
    """
    stage = Stage("merging", config, inputs, out_dir)
    if done := stage.done:
        return done

    # 1. Only fitting inputs
    training = verify(inputs["training"], "training")
    if training.inputs["teacher"] != fingerprint(inputs["teacher"]):
        raise StageError(
            f"the adapter in {inputs['training']} was trained on another teacher than {inputs['teacher']}: "
            "merge it into the one it was trained on"
        )
    format = choose_format(config.format, inputs["teacher"])
    device = roomy_device(inputs["teacher"])
    base = load_model(inputs["teacher"], device)
    dtype = base.dtype
    student = load_adapter(base.float(), Path(inputs["training"]) / "adapter").eval()

    # 2. Merge, and compare with what base + adapter said
    rows = store.load(inputs["trajectories"]).slice(0, config.check_prompts).to_pylist()
    mask_token_id = base.config.mask_token_id
    canvases = check_canvases(rows, mask_token_id)
    expected = masked_logits(student, canvases, mask_token_id)
    merged = merge(student)
    actual = masked_logits(merged, canvases, mask_token_id)
    difference = max_difference(expected, actual)
    if not difference <= config.tolerance:  # also catches NaN
        raise MergeError(
            f"merged logits differ from base + adapter by {difference:.3g} on {len(canvases)} prompts, "
            f"more than tolerance={config.tolerance}; the adapter may be too large for float32"
        )
    logger.info("merged logits equal base + adapter within %.2g on %d prompts", difference, len(canvases))

    # 3. Save in the teacher's dtype, and compare what can be loaded from there
    merged.to(dtype)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    tokenizer = load_tokenizer(inputs["teacher"])
    files = save_model(merged, stage.folder, tokenizer=tokenizer, format=format)
    dtype_name = str(dtype).removeprefix("torch.")
    del base, student, merged  # one model at a time
    saved = load_model(stage.folder, device).float()
    saved_difference = max_difference(expected, masked_logits(saved, canvases, mask_token_id))
    limit = config.tolerance if torch.finfo(dtype).bits >= 32 else math.inf
    if not saved_difference <= limit:
        raise MergeError(
            f"the model saved in {stage.folder} ({dtype_name}) differs from base + adapter by "
            f"{saved_difference:.3g}, more than tolerance={config.tolerance}"
        )
    logger.info("saved in %s, they differ from base + adapter by at most %.2g", dtype_name, saved_difference)
    return stage.finish(
        files=files,
        counts={"check_prompts": len(canvases)},
        metrics={"max_logit_difference": difference, "max_logit_difference_saved": saved_difference},
        details={"dtype": dtype_name, "format": format},
    )


def roomy_device(path: str | Path) -> torch.device:
    """A GPU that holds the model in the float64 of the check, else the CPU."""
    with torch.device("meta"):
        model = DiffusionTransformer(read_config(path))
    needed = ROOM * torch.float64.itemsize * sum(each.numel() for each in model.parameters())
    gpu = torch.device("cuda")
    if torch.cuda.is_available() and free_bytes(gpu) > needed:
        return gpu
    return torch.device("cpu")


def check_canvases(rows: Sequence[dict], mask_token_id: int) -> list[Tensor]:
    """One canvas (1, L) for each trajectory, masked from lightly (at least one position) to wholly."""
    rng = np.random.default_rng(0)
    canvases = []
    for index, row in enumerate(rows):
        response = np.array(row["response_ids"])
        count = -(-len(response) * (index + 1) // len(rows))
        response[rng.permutation(len(response))[:count]] = mask_token_id
        canvases.append(torch.from_numpy(np.concatenate([row["prompt_ids"], response]))[None])
    return canvases


@torch.no_grad()
def masked_logits(model: nn.Module, canvases: Sequence[Tensor], mask_token_id: int) -> list[Tensor]:
    """Logits (N, V) where decoding would read them.

    The float32 weights are multiplied in float64, so that what is compared is the weights and not
    the order in which float32 sums were rounded.
    """
    device = next(model.parameters()).device
    model.double()
    logits = [model(canvas.to(device), logits_at=canvas.to(device) == mask_token_id) for canvas in canvases]
    model.float()
    return logits


def max_difference(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(expected, actual, strict=True))
