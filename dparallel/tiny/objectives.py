"""Training objectives of tiny models: the model's input and the positions that count in the loss.

Legend: B rows, P prompt length, G response length, L = P + G.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dparallel.config.decoding import DecodingConfig
from dparallel.config.teacher import TeacherConfig
from dparallel.models.backbone import DiffusionConfig
from dparallel.problems.embedded import embedded_task


class View(NamedTuple):
    """A batch as the model receives it; the loss is the mean cross-entropy of the clean tokens at `read`.

    Attributes:
        canvas: int64 (B, L).
        levels: int64 (B, L), the attention pattern (see `models.attention`); None for full attention.
        read: bool (B, L).
    """

    canvas: Tensor
    levels: Tensor | None
    read: Tensor


class Objective(NamedTuple):
    """A training objective, and the decoding that tests the result.

    Attributes:
        view: makes a View from input_ids (B, L), P, the settings, the model's config and a generator seeded
            for the train step.
    """

    predicts_next: bool
    attention_pattern: str
    view: Callable[[Tensor, int, TeacherConfig, DiffusionConfig, torch.Generator], View]
    decoding: Callable[[TeacherConfig], DecodingConfig]


def masked_view(
    input_ids: Tensor,
    prompt_length: int,
    config: TeacherConfig,
    shape: DiffusionConfig,
    generator: torch.Generator,
) -> View:
    """Masked diffusion: full attention; the loss is taken at masked positions."""
    assert config.block_length is not None  # the objective's default
    rows, length = input_ids.shape
    masked, read = noise(rows, length - prompt_length, config.block_length, generator)
    masked, read = F.pad(masked, (prompt_length, 0)), F.pad(read, (prompt_length, 0))
    return View(input_ids.masked_fill(masked, shape.mask_token_id), None, read)


def noise(rows: int, gen_length: int, block_length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the masked response positions, and those of them that count in the loss: bool (B, G) each.

    Half of the rows mask the whole response with a ratio t, as in LLaDA's pre-training. The other half are
    semi-autoregressive views, as in decoding: earlier blocks clean, one block noised, later blocks fully
    masked and without loss. The loss is not weighted by 1/t, which only adds noise at this size.
    """
    ratio = 0.1 + 0.9 * (torch.rand(1, generator=generator) + torch.arange(rows) / rows).remainder(1)
    ratio = ratio[torch.randperm(rows, generator=generator)]  # stratified over the batch
    masked = torch.rand(rows, gen_length, generator=generator) < ratio[:, None]
    block = torch.randint(gen_length // block_length, (rows,), generator=generator)
    block_of = torch.arange(gen_length) // block_length
    view = torch.arange(rows) % 2 == 0  # semi-autoregressive rows
    earlier = view[:, None] & (block_of < block[:, None])
    later = view[:, None] & (block_of > block[:, None])
    masked = (masked & ~earlier) | later
    return masked, masked & ~later


def causal_view(
    input_ids: Tensor,
    prompt_length: int,
    config: TeacherConfig,
    shape: DiffusionConfig,
    generator: torch.Generator,
) -> View:
    """Next-token prediction with causal attention; the loss ends at the response's first EOS.

    Decoding stops at EOS, so later positions would only teach that EOS follows EOS.
    """
    rows, length = input_ids.shape
    response = input_ids[:, prompt_length:]
    after = (response == shape.eos_token_id).cumsum(1).roll(1, dims=1)  # EOS tokens before each position
    after[:, 0] = 0
    read = F.pad(after == 0, (prompt_length, 0))
    return View(input_ids, torch.arange(length).expand(rows, length), read)


def one_token_per_step(config: TeacherConfig) -> DecodingConfig:
    """Decoding of a diffusion teacher: one token per forward pass."""
    length = embedded_task(config.task).response_length
    return DecodingConfig(gen_length=length, block_length=config.block_length, rule="steps", steps=length)


def token_by_token(config: TeacherConfig) -> DecodingConfig:
    """Decoding of an autoregressive model."""
    return DecodingConfig(gen_length=embedded_task(config.task).response_length, mode="autoregressive")


OBJECTIVES = {
    "diffusion": Objective(False, "full", view=masked_view, decoding=one_token_per_step),
    "autoregressive": Objective(True, "causal", view=causal_view, decoding=token_by_token),
}
