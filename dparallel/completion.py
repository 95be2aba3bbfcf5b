"""Generate text from text prompts and chat conversations."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.canvas import DecodingError
from dparallel.decoding.generate import generate
from dparallel.decoding.streaming import Streamer
from dparallel.models.backbone import DiffusionTransformer
from dparallel.problems.prompts import PLAIN_TEXT, Messages, encode_chat, finish, render_all
from dparallel.problems.sources import Problem
from dparallel.problems.stops import cut, stop_at


@dataclass(frozen=True)
class Completion:
    """A response as text.

    Attributes:
        text: the response without its end token or stop text.
        tokens: token ids of the response, including the end token or stop text.
        nfe: number of forward passes (function evaluations) this response took.
        tokens_per_forward: `len(tokens) / nfe`.
        finish_reason: `stop` if the response ends with an end-of-sequence or end-of-turn token or with a
            stop text, `length` if it reached `gen_length`.
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
    decoding: DecodingConfig | None = None,
    batch_size: int | None = None,
    stops: Sequence[str] = (),
    streamer: Streamer | None = None,
) -> list[Completion]:
    """Generate a response for each prompt, in the order of the prompts.

    Args:
        prompts: texts, or conversations as lists of {"role": ..., "content": ...}. A text is encoded as it
            is, a conversation with the tokenizer's chat template. A beginning-of-sequence token is added
            once, if the tokenizer uses one.
        decoding: how to decode; by default as the checkpoint says, see `generate`.
        batch_size: prompts decoded together, see `generate`.
        stops: texts that end a response; they are not part of its text.
        streamer: gets the only prompt and its response while it is decoded, such as transformers'
            `TextDiffusionStreamer(tokenizer)`; see `decoding.streaming.Streamer`.

    Raises:
        DecodingError: a prompt is neither a text nor a conversation, a stop is not a text or empty, or
            `generate` rejects the request.
        ChatTemplateError: a conversation is given, but the chat template is missing or fails.
        MemoryError: a single prompt does not fit into memory.
    """
    if not isinstance(prompts, Collection):  # a generator is empty after one look
        raise DecodingError(f"prompts is a {type(prompts).__name__}: give a list of texts or conversations")
    if isinstance(prompts, str | Mapping) or any(isinstance(prompt, Mapping) for prompt in prompts):
        raise DecodingError("prompts is one text or one conversation: give a list of them, such as [prompts]")
    if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
        raise DecodingError(f"stops={stops!r}: give a list of texts, none of them empty")
    ids = [_encode(tokenizer, prompt, row) for row, prompt in enumerate(prompts)]
    ends = model.config.end_token_ids
    completions = []
    stop = stop_at(tokenizer, stops)
    for generation in generate(model, ids, decoding, batch_size, stop=stop, streamer=streamer):
        tokens = generation.tokens[: generation.num_tokens]
        whole = finish(tokens, tokenizer, ends)
        text = cut(whole, stops)
        completions.append(
            Completion(
                text=text,
                tokens=tokens,
                nfe=generation.nfe,
                tokens_per_forward=len(tokens) / generation.nfe,
                finish_reason="stop" if tokens[-1] in ends or text != whole else "length",
            )
        )
    return completions


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, row: int) -> list[int]:
    if isinstance(prompt, str):
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:  # half a surrogate pair
            raise DecodingError(f"prompt {row} is {prompt!r}, not a text in UTF-8: {error.reason}") from error
        [ids] = render_all([Problem(f"prompt {row}", "texts", prompt)], PLAIN_TEXT, tokenizer)
        return ids
    turns = [turn for turn in prompt if isinstance(turn, Mapping)] if isinstance(prompt, Sequence) else []
    if not turns or len(turns) < len(prompt):
        raise DecodingError(
            f"prompt {row} is {prompt!r}: give a text, or a conversation as a list of "
            '{"role": ..., "content": ...}; generate takes token ids'
        )
    return encode_chat(tokenizer, [dict(turn) for turn in turns])
