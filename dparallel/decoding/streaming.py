"""Pass a response to a streamer of transformers while it is decoded.

The calls are those of transformers' block diffusion models, where our block is their canvas: the prompt, then
for each forward pass the draft of what is not finished, for each finished block its tokens, and the end.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dparallel.decoding.canvas import DecodingError, Generation, Step


class Streamer(Protocol):
    """An object with the methods of transformers' streamers, such as `TextDiffusionStreamer`.

    If it also has `put_draft(value=)`, that gets a draft of the open blocks after each forward pass, (1, n):
    what is committed behind the tokens that were put, and the predictions for what is not.
    """

    def put(self, value: Tensor, /) -> Any:
        """Take token ids, (1, n) int64 on the CPU: first the prompt, then finished blocks in order."""

    def end(self) -> Any:
        """The response is finished."""


def check_streamer(streamer: object, prompts: int) -> None:
    """Raise a DecodingError for an object that is no streamer, or for several prompts."""
    lacking = [name for name in ("put", "end") if not callable(getattr(streamer, name, None))]
    if lacking:
        raise DecodingError(
            f"streamer={streamer!r} has no method {' and no method '.join(lacking)}: give an object with the "
            "methods put and end, and put_draft for drafts, such as transformers' TextDiffusionStreamer"
        )
    if getattr(streamer, "_takes_logits", False):
        raise DecodingError(
            f"streamer={streamer!r} asks for logits (_takes_logits), which are not kept: give one whose "
            "put_draft takes tokens; generate(observe=...) reports probabilities and entropies"
        )
    if prompts != 1:
        raise DecodingError(f"streamer with {prompts} prompts: give one prompt, since it takes one response")


Observe = Callable[[list[Step]], None]
Finish = Callable[[int, Generation], None]


def streamed(stream: "Stream", observe: Observe | None, finished: Finish | None) -> tuple[Observe, Finish]:
    """The callbacks of `generate` that also tell the stream, which comes first."""

    def observe_both(forward: list[Step]) -> None:
        stream.observe(forward)
        if observe is not None:
            observe(forward)

    def finish_both(row: int, generation: Generation) -> None:
        stream.finished(row, generation)
        if finished is not None:
            finished(row, generation)

    return observe_both, finish_both


class Stream:
    """Translates what `generate` reports of its only row into calls of a streamer."""

    def __init__(
        self, streamer: Streamer, prompt: Sequence[int], block_length: int, end_token_ids: Collection[int]
    ):
        self.streamer, self.block_length, self.end_token_ids = streamer, block_length, end_token_ids
        self.tokens: list[int] = []  # of the response, committed or as predicted by the latest forward pass
        self.sent = 0
        self.ended = False  # an end token was sent
        streamer.put(_row(prompt))

    def observe(self, forward: Sequence[Step]) -> None:
        """After each forward pass. The blocks before the first one that it reads are finished."""
        [step] = forward
        self._put(min(step.offsets) // self.block_length * self.block_length)
        self.tokens += [0] * (max(step.offsets) + 1 - len(self.tokens))
        for offset, token in zip(step.offsets, step.tokens, strict=True):
            self.tokens[offset] = token  # what is committed and read again is replaced by its prediction
        if hasattr(self.streamer, "put_draft") and not self.ended:
            self.streamer.put_draft(value=_row(self.tokens[self.sent :]))

    def finished(self, row: int, generation: Generation) -> None:
        """At the end of the response."""
        self.tokens = generation.tokens
        self._put(generation.num_tokens)
        self.streamer.end()

    def _put(self, count: int) -> None:
        """Send the first `count` tokens as far as they were not sent, up to the first end token."""
        new = [] if self.ended else self.tokens[self.sent : count]
        end = next((place for place, token in enumerate(new) if token in self.end_token_ids), None)
        if end is not None:
            self.ended, new = True, new[: end + 1]
        if new:
            self.streamer.put(_row(new))
            self.sent += len(new)


def _row(tokens: Sequence[int]) -> Tensor:
    return torch.tensor([list(tokens)], dtype=torch.long)
