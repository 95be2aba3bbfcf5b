"""The merging stage: a student that stands alone, proven equal to base + adapter at every merge.

Legend: G response positions, L canvas length, N masked positions, V vocabulary.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from dparallel.config.experiment import MergingConfig
from dparallel.decoding.memory import free_bytes
from dparallel.models.backbone import DiffusionTransformer
from dparallel.models.checkpoints import choose_format, load_model, load_tokenizer, read_config, save_model
from dparallel.models.lora import detach, fold, load_adapter, merged_weight
from dparallel.models.placement import empty_model
from dparallel.models.sizes import stored_bytes
from dparallel.stages.manifest import Manifest, Stage, StageError, fingerprint, verify
from dparallel.trajectories import store

log = logging.getLogger(__name__)

ROOM = 1.25  # of the weights: adapter, canvases and logits beside them


class MergeError(RuntimeError):
    """The merged model does not compute what base + adapter computed; the stage stays unfinished."""


def run_stage(
    config: MergingConfig, inputs: dict[str, str], out_dir: str | Path, code: str | None = None
) -> Manifest:
    """Merge the adapter of `inputs["training"]` into `inputs["teacher"]`, check, and save.

    The check compares logits on partly masked canvases of `config.check_prompts` trajectories of
    `inputs["trajectories"]`. Two largest differences from base + adapter in float32 go into the manifest:
    `max_logit_difference` of the merge, also in float32, and `max_logit_difference_saved` of the model
    read back from the folder, whose weights are rounded to the teacher's dtypes.

    Args:
        code: digest of the code whose result is taken; by default that of this code.

    Raises:
        StageError: the adapter was trained on another teacher, or an input is damaged.
        AdapterError: the adapter does not fit the teacher.
        CheckpointError: the teacher has no original format to be saved in, or the disk no room.
        MergeError: the first difference is above `config.tolerance`, or the second one is though the
            teacher's dtype rounds nothing away (bf16 and fp16 do).
    """
    stage = Stage("merging", config, inputs, out_dir, code)
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
    base = load_model(inputs["teacher"], roomy_device(inputs["teacher"]))
    student = load_adapter(base, Path(inputs["training"]) / "adapter").eval()

    # 2. Merge in float32, and compare with what base + adapter said
    rows = store.load(inputs["trajectories"]).slice(0, config.check_prompts).to_pylist()
    mask_token_id = base.config.mask_token_id
    canvases = check_canvases(rows, mask_token_id)
    expected = masked_logits(student, canvases, mask_token_id)
    merged, adapters = detach(student)
    merged.config.attention_pattern = training.config["recipe"]["attention"]
    actual = masked_logits(merged, canvases, mask_token_id, adapters)
    difference = max_difference(expected, actual)
    if not difference <= config.tolerance:  # also catches NaN
        raise MergeError(
            f"merged logits differ from base + adapter by {difference:.3g} on {len(canvases)} prompts, "
            f"more than tolerance={config.tolerance}; the adapter may be too large for float32"
        )
    log.info("merged logits equal base + adapter within %.2g on %d prompts", difference, len(canvases))

    # 3. Save, each matrix in its own dtype, and compare what can be loaded from there
    fold(adapters)
    device, dtype_name = merged.device, str(merged.dtype).removeprefix("torch.")
    rounds = any(torch.finfo(weight.dtype).bits < 32 for weight in merged.parameters())
    tokenizer = load_tokenizer(inputs["teacher"])
    files = save_model(merged, stage.folder, tokenizer=tokenizer, format=format)
    del base, student, merged, adapters  # one model at a time
    saved = load_model(stage.folder, device)
    saved_difference = max_difference(expected, masked_logits(saved, canvases, mask_token_id))
    limit = math.inf if rounds else config.tolerance
    if not saved_difference <= limit:
        raise MergeError(
            f"the model saved in {stage.folder} ({dtype_name}) differs from base + adapter by "
            f"{saved_difference:.3g}, more than tolerance={config.tolerance}"
        )
    log.info("saved in %s, they differ from base + adapter by at most %.2g", dtype_name, saved_difference)
    return stage.finish(
        files=files,
        counts={"check_prompts": len(canvases)},
        metrics={"max_logit_difference": difference, "max_logit_difference_saved": saved_difference},
        details={"dtype": dtype_name, "format": format},
    )


def roomy_device(path: str | Path) -> torch.device:
    """A GPU that holds the model and what the check computes with, else the CPU."""
    gpu = torch.device("cuda")
    if torch.cuda.is_available() and free_bytes(gpu) > merging_bytes(path):
        return gpu
    return torch.device("cpu")


def merging_bytes(path: str | Path) -> int:
    """Of the model as it is stored, and of the part with most weights while it is merged and widened."""
    model = empty_model(read_config(path))
    widest = max(sum(weight.numel() for weight in part.parameters()) for part in parts(model))
    return int(ROOM * stored_bytes(path)) + 2 * torch.float64.itemsize * widest


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
def masked_logits(
    model: nn.Module,
    canvases: Sequence[Tensor],
    mask_token_id: int,
    adapters: Mapping[nn.Parameter, Linear] | None = None,
) -> list[Tensor]:
    """Logits (N, V) where decoding would read them.

    The float32 weights are multiplied in float64, so that what is compared is the weights and not
    the order in which float32 sums were rounded.

    Args:
        adapters: merged, in float32, into the matrices they are of while those compute.
    """
    with widened(model, adapters or {}):
        device = next(model.parameters()).device
        return [model(canvas.to(device), logits_at=canvas.to(device) == mask_token_id) for canvas in canvases]


@contextmanager
def widened(model: nn.Module, adapters: Mapping[nn.Parameter, Linear]) -> Iterator[None]:
    """Compute in float64, with the weights of one part of the model as wide at a time.

    A model in bf16 would be four times its size in float64 as a whole.
    """
    narrow: dict[nn.Parameter, Tensor] = {}

    def widen(part: nn.Module, *_: Any) -> None:
        for weight in part.parameters():
            narrow[weight] = weight.data
            adapter = adapters.get(weight)
            weight.data = (weight if adapter is None else merged_weight(weight, adapter)).double()

    def restore(part: nn.Module, *_: Any) -> None:
        for weight in part.parameters():
            weight.data = narrow.pop(weight)

    [whole] = (each for each in model.modules() if isinstance(each, DiffusionTransformer))
    hooks = []
    for part in parts(whole):
        hooks += [
            part.register_forward_pre_hook(widen),
            part.register_forward_hook(restore, always_call=True),
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def parts(model: DiffusionTransformer) -> list[nn.Module]:
    """What computes one after the other; together they have all weights."""
    return [model.embedding, *model.layers, model.norm, model.lm_head]


def max_difference(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(expected, actual, strict=True))
