"""The decoding loop of published code, written straightforwardly, as a rival of `generate`."""

from collections.abc import Sequence

import torch

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.canvas import Generation
from dparallel.models.backbone import DiffusionTransformer


@torch.inference_mode()
def plain_loop(
    model: DiffusionTransformer, prompts: Sequence[Sequence[int]], decoding: DecodingConfig, batch_size: int
) -> list[Generation]:
    """Sequential decoding with an entropy threshold, as LLaDA's, Fast-dLLM's and dParallel's code does it.

    Every forward pass computes all positions; probabilities of all of them are in float64; each row's masked
    positions are judged one by one; a batch of prompts, which have equal lengths, goes on until its slowest
    row is done. It gives the tokens of `generate` with `stop_at_eos=False`.
    """
    generations = []
    for start in range(0, len(prompts), batch_size):
        generations += _decode_together(model, prompts[start : start + batch_size], decoding)
    return generations


def _decode_together(
    model: DiffusionTransformer, prompts: Sequence[Sequence[int]], decoding: DecodingConfig
) -> list[Generation]:
    mask, threshold, length = model.config.mask_token_id, decoding.threshold, len(prompts[0])
    assert threshold is not None
    canvas = torch.full((len(prompts), length + decoding.gen_length), mask, device=model.device)
    canvas[:, :length] = torch.tensor(prompts, device=model.device)
    steps = torch.full_like(canvas, -1)
    nfe = 0
    for start in range(length, canvas.shape[1], decoding.block_length):
        end = start + decoding.block_length
        while (canvas[:, start:end] == mask).any():
            masked = canvas == mask
            masked[:, end:] = False
            logits = model(canvas)
            p = logits.double().softmax(-1)
            logits[..., mask] = -torch.inf
            tokens = torch.where(masked, logits.argmax(-1), canvas)
            entropy = -(p * p.clamp(min=1e-300).log()).sum(-1)
            entropy = torch.where(masked, entropy, torch.inf)
            commit = torch.zeros_like(masked)
            for row, count in enumerate(masked.sum(1)):
                order = entropy[row].topk(int(count), largest=False).indices
                commit[row, order] = True
                for place in order[1:]:
                    if entropy[row, place] > threshold:
                        commit[row, place] = False
            canvas[commit] = tokens[commit]
            steps[commit] = nfe
            nfe += 1
    return [
        Generation(row[length:].tolist(), at[length:].tolist(), [], int(at.max()) + 1, decoding.gen_length)
        for row, at in zip(canvas, steps, strict=True)
    ]
