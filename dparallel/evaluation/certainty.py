"""How certain a model is of every position while it decodes, computed from a generation."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dparallel.config.decoding import DecodingConfig, beside
from dparallel.config.modes import MODES, modes_of
from dparallel.decoding.canvas import Generation, Step
from dparallel.decoding.patterns import attention_levels
from dparallel.decoding.revision import soft_inputs
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


def suited(decoding: DecodingConfig, pattern: str | None) -> DecodingConfig:
    """The same decoding if a model can be decoded so, otherwise in the first mode that suits it.

    So a teacher with full attention is shown beside a block-causal student, with the student's rule.

    Args:
        decoding: with a rule that all modes of models with this pattern take, such as one with a threshold.
        pattern: attention pattern that the model was trained with; None if it is unknown.
    """
    modes = modes_of(pattern)
    if decoding.mode in modes:
        return decoding
    mode = modes[0]
    changes = {"mode": mode} if "rule" in MODES[mode].fixed else {"mode": mode, "rule": decoding.rule}
    return DecodingConfig(**beside(decoding.model_dump(), changes), **changes)


def read_certainty(path: Path, label: str) -> CertaintyMap:
    """Read a map from a JSON file; StageError if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return CertaintyMap(label, torch.tensor(found["probability"]), found["commit_step"], found["tokens"])
    except (OSError, ValueError, KeyError) as error:
        raise StageError(f"{path} is damaged: delete it to make it again ({error})") from error


@torch.inference_mode()
def replay(
    model: DiffusionTransformer,
    prompt: Sequence[int],
    generation: Generation,
    decoding: DecodingConfig,
    steps: Sequence[Step] = (),
) -> Tensor:
    """Probability of the most likely token at each step and response position, (nfe, G) float32.

    Canvases are reconstructed from `commit_step`, in the mode `revising` from all `steps` of the row, and
    computed without a KV cache. Positions in blocks that are not open yet are included.
    """
    config, device = model.config, model.device
    tokens = torch.tensor(generation.tokens, device=device)
    committed = torch.tensor(generation.commit_step, device=device)
    step = torch.arange(generation.nfe, device=device)[:, None]
    response = torch.where(committed < step, tokens, config.mask_token_id)  # (nfe, G)
    if decoding.revises:
        response, block, sureness = _revised(steps, response, config.mask_token_id)
    before = torch.tensor(prompt, device=device).expand(generation.nfe, -1)
    canvases = torch.cat([before, response], dim=1)  # (nfe, P + G)
    where = torch.arange(len(prompt), canvases.shape[1], device=device)
    levels = attention_levels(decoding, torch.tensor([len(prompt)], device=device), canvases.shape[1])
    certainty = []
    for rows in torch.arange(generation.nfe, device=device).split(FORWARD_ROWS):
        canvas, inputs = canvases[rows], None
        seen = None if levels is None else levels.expand(len(canvas), -1)
        if decoding.revises:
            held = response[rows].gather(1, block[rows])
            inputs = soft_inputs(
                model.get_input_embeddings(),
                config.mask_token_id,
                canvas,
                places=torch.arange(canvas.shape[1], device=device) - len(prompt) - block[rows, :1],
                tokens=held,
                committed=held != config.mask_token_id,
                probability=sureness[rows],
            )
        read = where.expand(len(canvas), -1)
        logits = model(canvas, logits_at=read, levels=seen, inputs_embeds=inputs).float()  # (rows, G, V)
        probability = logits.softmax(-1)
        probability[..., config.mask_token_id] = 0  # never predicted
        certainty.append(probability.amax(-1))
    return torch.cat(certainty).cpu()


def _revised(steps: Sequence[Step], response: Tensor, mask: int) -> tuple[Tensor, Tensor, Tensor]:
    """What forward passes that revise tokens took as input.

    Args:
        response: of the shape of the first result.

    Returns:
        (nfe, G) tokens; and for the l positions of the active block, each (nfe, l), their offsets and the
        probabilities of their tokens by the previous forward pass.
    """
    response, sureness = torch.full_like(response, mask), torch.zeros(response.shape, device=response.device)
    for number, step in enumerate(steps):
        at, tokens, new = (
            torch.tensor(column, device=response.device)
            for column in (step.offsets, step.tokens, step.commit)
        )
        response[number + 1 :, at[new]] = tokens[new]
        sureness[number + 1 :, at] = torch.tensor(step.probability, device=response.device)
    block = torch.tensor([step.offsets for step in steps], device=response.device)
    return response, block, sureness.gather(1, block)
