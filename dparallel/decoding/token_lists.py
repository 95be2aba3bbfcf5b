"""Convert prompts of any supported type to lists of token ids, and validate them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dparallel.decoding.canvas import DecodingError
from dparallel.models.backbone import DiffusionConfig

Prompt = Sequence[int] | Tensor | np.ndarray
Prompts = Sequence[Prompt] | Tensor | np.ndarray


def token_lists(prompts: Prompts) -> list[list[int]]:
    """Token ids of each prompt.

    Args:
        prompts: a sequence of prompts, each a sequence, tensor (L,) or array (L,) of ids; or one integer
            tensor or array (B, L).

    Raises:
        DecodingError: any other type, such as a text, a single prompt, or values that are not token ids.
    """
    if isinstance(prompts, str | Mapping) or hasattr(prompts, "input_ids"):
        kind = type(prompts).__name__
        raise DecodingError(
            f"prompts is a {kind}: give lists of token ids, such as tokenizer(texts).input_ids; "
            "dparallel.complete takes texts"
        )
    if isinstance(prompts, Tensor | np.ndarray):
        if prompts.ndim != 2:
            raise DecodingError(
                f"prompts has shape {tuple(prompts.shape)}: give (B, L), a prompt a row, or a list of prompts"
            )
        return [_token_list(f"prompt {row}", prompt) for row, prompt in enumerate(prompts)]
    if not isinstance(prompts, Sequence):
        raise DecodingError(f"prompts is a {type(prompts).__name__}: give a list of lists of token ids")
    return [_token_list(f"prompt {row}", prompt) for row, prompt in enumerate(prompts)]


def check_padding(name: str, prompt: Sequence[int], config: DiffusionConfig) -> None:
    """Reject prompts that begin or end with padding, which the model would read as text.

    If the padding token is also the beginning- or end-of-sequence token, one of them is accepted.

    Raises:
        DecodingError: names the prompt and the padding token.
    """
    pad = config.pad_token_id
    if pad is None:
        return
    allowed = int(pad in config.end_token_ids or pad == config.bos_token_id)
    for where, tokens in (("begins", prompt), ("ends", reversed(prompt))):
        count = next((at for at, token in enumerate(tokens) if token != pad), len(prompt))
        if count > allowed:
            raise DecodingError(
                f"{name} {where} with {count} of the padding token {pad} (pad_token_id), which would "
                "be read as text: give prompts of their own lengths, as tokenizer(texts).input_ids are "
                "without padding=True; of a padded row with its attention mask take ids[mask.bool()]"
            )


def _token_list(name: str, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        raise DecodingError(f"{name} is a text: give its token ids, or use dparallel.complete")
    if isinstance(prompt, Tensor | np.ndarray):
        if prompt.ndim != 1:
            raise DecodingError(f"{name} has shape {tuple(prompt.shape)}: give its token ids as (L,)")
        whole = torch.as_tensor(prompt)
        if whole.is_floating_point() or whole.is_complex() or whole.dtype == torch.bool:
            raise DecodingError(f"{name} is of dtype {prompt.dtype}: give token ids, which are integers")
        return whole.tolist()
    if not isinstance(prompt, Sequence):
        raise DecodingError(
            f"{name} is {prompt!r}: give a list of prompts, and each prompt as a list of token ids, such as "
            "[[5, 6]] for one prompt"
        )
    if set(map(type, prompt)) <= {int}:
        return list(prompt)
    for token in prompt:
        if isinstance(token, bool) or not isinstance(token, int | np.integer):
            if isinstance(token, Tensor) and token.ndim == 0 and not token.is_floating_point():
                continue
            raise DecodingError(f"{name} holds {token!r}, which is no token id: give integers")
    return [int(token) for token in prompt]
