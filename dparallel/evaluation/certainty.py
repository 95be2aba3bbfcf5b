"""How certain a model is of every position while it decodes, computed from a generation."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.blocks import attention_levels
from dparallel.decoding.canvas import Generation
from dparallel.models.backbone import DiffusionTransformer
from dparallel.stages.manifest import StageError

FORWARD_ROWS = 16


@dataclass(frozen=True)
class CertaintyMap:
    """The certainty of a model during the decoding of a response.

    Attributes:
        label: title in the plot.
        probability: probability of the most likely token, (steps, G).
        commit_step: step at which each of the G tokens was committed.
        tokens: the G tokens as texts.
    """

    label: str
    probability: Tensor
    commit_step: list[int]
    tokens: list[str]


def read_certainty(path: Path, label: str) -> CertaintyMap:
    """Read a map from a JSON file; StageError if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return CertaintyMap(label, torch.tensor(found["probability"]), found["commit_step"], found["tokens"])
    except (OSError, ValueError, KeyError) as error:
        raise StageError(f"{path} is damaged: delete it to make it again ({error})") from error


@torch.inference_mode()
def replay(
    model: DiffusionTransformer, prompt: Sequence[int], generation: Generation, decoding: DecodingConfig
) -> Tensor:
    """Probability of the most likely token at each step and response position, (nfe, G) float32.

    Canvases are reconstructed from `commit_step` and computed without a KV cache. Positions in blocks that
    are not open yet are included.
    """
    config, device = model.config, model.device
    tokens = torch.tensor(generation.tokens, device=device)
    committed = torch.tensor(generation.commit_step, device=device)
    step = torch.arange(generation.nfe, device=device)[:, None]
    response = torch.where(committed < step, tokens, config.mask_token_id)  # (nfe, G)
    before = torch.tensor(prompt, device=device).expand(generation.nfe, -1)
    canvases = torch.cat([before, response], dim=1)  # (nfe, P + G)
    where = torch.arange(len(prompt), canvases.shape[1], device=device)
    levels = attention_levels(decoding, torch.tensor([len(prompt)], device=device), canvases.shape[1])
    certainty = []
    for canvas in canvases.split(FORWARD_ROWS):
        seen = None if levels is None else levels.expand(len(canvas), -1)
        logits = model(canvas, logits_at=where.expand(len(canvas), -1), levels=seen).float()  # (rows, G, V)
        probability = logits.softmax(-1)
        probability[..., config.mask_token_id] = 0  # never predicted
        certainty.append(probability.amax(-1))
    return torch.cat(certainty).cpu()
