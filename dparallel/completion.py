"""Texts in, texts out: one call for prompts and conversations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.canvas import DecodingError
from dparallel.decoding.generate import DEFAULT_DECODING, generate
from dparallel.models.backbone import DiffusionTransformer
from dparallel.problems.prompts import PLAIN_TEXT, Messages, encode_chat, finish, render_all
from dparallel.problems.sources import Problem


@dataclass(frozen=True)
class Completion:
    """One response as text.

    Attributes:
        text: the response, without the token that ended it.
        tokens: its token ids, up to and with the one that ended it.
        nfe: forwards spent on it.
        tokens_per_forward: tokens divided by forwards.
        finish_reason: `stop` where an end-of-text or end-of-turn token ended it, `length` where the response
            is as long as `gen_length` allows.
    """

    text: str
    tokens: list[int]
    nfe: int
    tokens_per_forward: float
    finish_reason: Literal["stop", "length"]


def complete(
    model: DiffusionTransformer,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Messages],
    decoding: DecodingConfig = DEFAULT_DECODING,
    batch_size: int | None = None,
) -> list[Completion]:
    """Decode one response for each text or conversation, in the order given.

    Args:
        prompts: a text is encoded as it is; a conversation, a list of {"role": ..., "content": ...}, by the
            tokenizer's chat template. A beginning-of-text token is put in front where the tokenizer wants
            one, once.
        batch_size: as of `generate`.

    Raises:
        DecodingError: something else than texts and conversations, or what `generate` refuses.
        ChatTemplateError: a conversation, and the tokenizer has no chat template or it fails.
        MemoryError: not even one row fits.
    """
    if isinstance(prompts, str | Mapping) or any(isinstance(prompt, Mapping) for prompt in prompts):
        raise DecodingError("prompts is one text or one conversation: give a list of them, such as [prompts]")
    ids = [_encode(tokenizer, prompt, row) for row, prompt in enumerate(prompts)]
    ends = model.config.end_token_ids
    completions = []
    for generation in generate(model, ids, decoding, batch_size):
        tokens = generation.tokens[: generation.num_tokens]
        completions.append(
            Completion(
                text=finish(tokens, tokenizer, ends),
                tokens=tokens,
                nfe=generation.nfe,
                tokens_per_forward=len(tokens) / generation.nfe,
                finish_reason="stop" if tokens[-1] in ends else "length",
            )
        )
    return completions


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, row: int) -> list[int]:
    if isinstance(prompt, str):
        [ids] = render_all([Problem(f"prompt {row}", "texts", prompt)], PLAIN_TEXT, tokenizer)
        return ids
    turns = [turn for turn in prompt if isinstance(turn, Mapping)] if isinstance(prompt, Sequence) else []
    if not turns or len(turns) < len(prompt):
        raise DecodingError(
            f"prompt {row} is {prompt!r}: give a text, or a conversation as a list of "
            '{"role": ..., "content": ...}; generate takes token ids'
        )
    return encode_chat(tokenizer, [dict(turn) for turn in turns])
