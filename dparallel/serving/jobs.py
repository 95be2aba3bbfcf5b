"""What the HTTP side and the decoding thread tell each other: a response to decode, and its events."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.stops import Stop


@dataclass(frozen=True)
class Draft:
    """What a forward pass read: a prediction for each masked position of the open blocks.

    In the mode `revising`, which may change committed tokens, it reads all positions of the active block.

    Attributes:
        denoise_step: the response's forward pass, from 0.
        positions: in the response, from 0.
        tokens, confidences: predicted token ids and their probabilities.
        committed: whether this forward pass committed the token, or put it in place of another one.
    """

    denoise_step: int
    positions: list[int]
    tokens: list[int]
    confidences: list[float]
    committed: list[bool]


@dataclass(frozen=True)
class Progress:
    """After a forward pass: all tokens before the first that is masked or may change, and what it drafted.

    Only sent if it has more tokens than the previous one, or a draft.
    """

    tokens: list[int]
    confidence: list[float]
    draft: Draft | None = None


@dataclass(frozen=True)
class Finished:
    """A response: its tokens up to and including the first end token or the end of a stop text.

    Attributes:
        nfe: its forward passes.
        seconds: from taking a row to the end.
    """

    tokens: list[int]
    confidence: list[float]
    nfe: int
    seconds: float
    draft: Draft | None = None


@dataclass(frozen=True)
class Failed:
    """No response: `reason` for programs, `message` for people."""

    reason: Literal["cancelled", "timeout", "memory", "weights", "error", "shutdown"]
    message: str


Event = Progress | Finished | Failed


@dataclass(eq=False)
class Job:
    """A response to decode.

    Attributes:
        model: name of the model.
        prompt: token ids that `check_prompts` accepts, or with a gap `check_infill`.
        decoding: how to decode; its `seed` is not used.
        seed: of sampling, from `generate.row_seed`.
        listen: called in the decoding thread with each event; the last one is `Finished` or `Failed`.
        stop: where the response ends because of a stop text.
        max_tokens: where it ends at the latest.
        gap: masked positions within `prompt`, which are the response; None if it follows the prompt.
        progress: whether `Progress` is wanted, `drafts`: with drafts.
        deadline: time (`time.monotonic`) at which the job fails.
        submitted, started: times at which it was accepted and took a row; for measurements.
    """

    model: str
    prompt: list[int]
    decoding: DecodingConfig
    seed: int
    listen: Callable[[Event], None]
    stop: Stop | None = None
    max_tokens: int | None = None
    gap: int | None = None
    progress: bool = False
    drafts: bool = False
    deadline: float = math.inf
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    told: int = 0  # tokens of the latest `Progress`
    cancelled: bool = False
    ended: bool = False  # the last event was sent

    @property
    def watched(self) -> bool:
        """Whether its state is read after every forward pass, and not at its end only."""
        return self.progress or self.stop is not None or self.max_tokens is not None
