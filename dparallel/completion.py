"""Generate text from text prompts and chat conversations."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedTokenizerBase

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.canvas import DecodingError
from dparallel.decoding.generate import check_ids, generate
from dparallel.decoding.infill import infill as fill
from dparallel.decoding.streaming import Streamer
from dparallel.models.backbone import DiffusionTransformer
from dparallel.problems.gaps import Part, check_parts, encode_infill, gap_texts, joined
from dparallel.problems.prompts import PLAIN_TEXT, Messages, encode_chat, finish, render_all
from dparallel.problems.sources import Problem
from dparallel.problems.stops import cut, stop_at


@dataclass(frozen=True)
class Completion:
    """A response as text, or a text whose gaps are filled.

    Attributes:
        text: the response without its end token or stop text. Of an infill, its texts and the texts of its
            gaps in between.
        tokens: token ids of the response, including the end token or stop text. Of an infill, those of its
            gaps, one after the other, including end tokens.
        nfe: number of forward passes (function evaluations) this response took.
        tokens_per_forward: `len(tokens) / nfe`; of an infill without its end tokens.
        finish_reason: `stop` if the response ends with an end-of-sequence or end-of-turn token or with a
            stop text, `length` if it reached `gen_length`, or is an infill.
        gaps: of an infill, the text of each gap without end tokens.
    """

    text: str
    tokens: list[int]
    nfe: int
    tokens_per_forward: float
    finish_reason: Literal["stop", "length"]
    gaps: list[str] = field(default_factory=list)


def complete(
    model: DiffusionTransformer,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Messages] | None = None,
    decoding: DecodingConfig | None = None,
    batch_size: int | None = None,
    stops: Sequence[str] = (),
    streamer: Streamer | None = None,
    infill: Sequence[Sequence[Part]] | None = None,
) -> list[Completion]:
    """Generate a response for each prompt, in the order of the prompts, or fill the gaps of texts.

    Args:
        prompts: texts, or conversations as lists of {"role": ..., "content": ...}. A text is encoded as it
            is, a conversation with the tokenizer's chat template. A beginning-of-sequence token is added
            once, if the tokenizer uses one.
        decoding: how to decode; by default as the checkpoint says, see `generate`.
        batch_size: prompts decoded together, see `generate`.
        stops: texts that end a response; they are not part of its text.
        streamer: gets the only prompt and its response while it is decoded, such as transformers'
            `TextDiffusionStreamer(tokenizer)`; see `decoding.streaming.Streamer`.
        infill: texts with gaps, each a list of texts and of numbers of tokens, such as
            `[["The total is ", 4, "."]]`. They follow the prompts, one each, or stand alone. See
            `decoding.infill.infill` for the models and decodings that suit; stops and streamers do not.

    Raises:
        DecodingError: a prompt is neither a text nor a conversation, a stop is not a text or empty, an infill
            is no list of texts and lengths, or `generate` or `decoding.infill.infill` rejects the request.
        ChatTemplateError: a conversation is given, but the chat template is missing or fails.
        MemoryError: a single prompt does not fit into memory.
    """
    if infill is not None:
        return _infilled(model, tokenizer, prompts, decoding, batch_size, stops, streamer, infill)
    ids = _encode_all(tokenizer, prompts)
    listed = isinstance(stops, Collection) and not isinstance(stops, str)
    if not listed or not all(isinstance(stop, str) and stop for stop in stops):
        raise DecodingError(f"stops={stops!r}: give a list of texts, none of them empty")
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


def _infilled(
    model: DiffusionTransformer,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Messages] | None,
    decoding: DecodingConfig | None,
    batch_size: int | None,
    stops: Sequence[str],
    streamer: Streamer | None,
    infill: Sequence[Sequence[Part]],
) -> list[Completion]:
    if stops:
        raise DecodingError(f"stops={stops!r} with infill, whose gaps have fixed lengths: leave them out")
    if streamer is not None:
        raise DecodingError(
            "streamer with infill, whose text is not decoded from left to right: leave it out"
        )
    if isinstance(infill, str) or not isinstance(infill, Sequence):
        raise DecodingError(f"infill is {infill!r}: give a list of texts with gaps, such as [['A', 4, 'Z']]")
    if any(isinstance(parts, str | int) for parts in infill):
        raise DecodingError("infill is one text with gaps: give a list of them, such as [infill]")
    for row, parts in enumerate(infill):
        check_parts(parts, f"infill {row}")
    fronts = [None] * len(infill) if prompts is None else _encode_all(tokenizer, prompts)
    if len(fronts) != len(infill):
        raise DecodingError(
            f"{len(fronts)} prompts with {len(infill)} texts with gaps: give one for each, or no prompts"
        )
    canvases = []
    for row, (front, parts) in enumerate(zip(fronts, infill, strict=True)):
        if front is not None:
            check_ids(f"prompt {row}", front, model.config)
        canvases.append(encode_infill(tokenizer, parts, model.config, f"infill {row}", front))
    ends = model.config.end_token_ids
    completions = []
    for parts, filled in zip(infill, fill(model, canvases, decoding, batch_size), strict=True):
        gaps = gap_texts(tokenizer, parts, filled.tokens, ends)
        completions.append(
            Completion(
                text=joined(parts, gaps),
                tokens=filled.tokens,
                nfe=filled.nfe,
                tokens_per_forward=filled.num_tokens / filled.nfe,
                finish_reason="length",
                gaps=gaps,
            )
        )
    return completions


def _encode_all(tokenizer: PreTrainedTokenizerBase, prompts: object) -> list[list[int]]:
    """Token ids of prompts, as `complete` takes them."""
    if not isinstance(prompts, Collection):  # a generator is empty after one look
        raise DecodingError(f"prompts is a {type(prompts).__name__}: give a list of texts or conversations")
    if isinstance(prompts, str | Mapping) or any(isinstance(prompt, Mapping) for prompt in prompts):
        raise DecodingError("prompts is one text or one conversation: give a list of them, such as [prompts]")
    return [_encode(tokenizer, prompt, row) for row, prompt in enumerate(prompts)]


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
