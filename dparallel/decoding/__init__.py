"""Fill masked canvases: one call, `generate`, for prompts of any lengths."""

import hashlib
from collections.abc import Sequence

import torch

from dparallel.config import DecodingConfig
from dparallel.decoding.canvas import Canvas, Generation
from dparallel.decoding.rules import RULES
from dparallel.decoding.sequential import decode
from dparallel.models.backbone import DiffusionTransformer

__all__ = ["RULES", "Generation", "check_prompts", "generate"]

DEFAULT_BATCH_SIZE = 32


@torch.inference_mode()
def generate(
    model: DiffusionTransformer,
    prompts: Sequence[Sequence[int]],
    decoding: DecodingConfig,
    batch_size: int | None = None,
) -> list[Generation]:
    """Decode one response for each prompt, in the order given.

    A row's tokens, commit steps and NFE do not depend on what else is in its batch.

    Args:
        prompts: token ids, of any lengths.
        batch_size: rows decoded together (32 unless told).

    Raises:
        ValueError: a prompt that does not fit the model or holds impossible ids, or a model
            without a usable mask or end-of-text id.
    """
    check_prompts(model, prompts, decoding)
    batch_size = DEFAULT_BATCH_SIZE if batch_size is None else batch_size
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give at least 1")
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))  # least padding
    generations: dict[int, Generation] = {}
    for start in range(0, len(prompts), batch_size):
        rows = by_length[start : start + batch_size]
        canvas = Canvas.start([prompts[row] for row in rows], decoding.gen_length, model)
        decode(model, canvas, decoding, [_row_seed(decoding.seed, prompts[row]) for row in rows])
        generations.update(zip(rows, canvas.generations(), strict=True))
    return [generations[row] for row in range(len(prompts))]


def check_prompts(
    model: DiffusionTransformer, prompts: Sequence[Sequence[int]], decoding: DecodingConfig
) -> None:
    """Raise a ValueError for what `generate` cannot decode, before any work."""
    config = model.config
    for name, used in (("mask_token_id", True), ("eos_token_id", decoding.stop_at_eos)):
        token_id = getattr(config, name)
        if used and (token_id is None or not 0 <= token_id < config.vocab_size):
            raise ValueError(
                f"the model's {name}={token_id} is not in its vocabulary (0 to {config.vocab_size - 1}); "
                f"set it in the checkpoint's config.json"
            )
    limit = config.max_position_embeddings - decoding.gen_length
    for row, prompt in enumerate(prompts):
        if len(prompt) > limit:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens; with gen_length={decoding.gen_length} this model "
                f"(max_position_embeddings={config.max_position_embeddings}) takes at most {limit}: "
                "shorten the prompt or gen_length"
            )
        outside = next((each for each in prompt if not 0 <= each < config.vocab_size), None)
        if outside is not None or config.mask_token_id in prompt:
            raise ValueError(
                f"prompt {row} holds token id {config.mask_token_id if outside is None else outside}; "
                f"valid ids are 0 to {config.vocab_size - 1} without the mask {config.mask_token_id}"
            )


def _row_seed(seed: int | None, prompt: Sequence[int]) -> int:
    """A seed of the row's own, so that its draws do not depend on its place in a batch."""
    if seed is None:
        return int(torch.randint(2**62, ()))
    text = f"{seed}/{','.join(map(str, prompt))}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), signed=True)
