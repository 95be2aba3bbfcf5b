"""State of all rows of a `generate` call, and its results.

Legend: N rows, b rows of a forward pass, L canvas length of the longest row, G `gen_length`, K blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dparallel.config.base import UserError
from dparallel.config.decoding import DecodingConfig
from dparallel.models.backbone import DiffusionConfig

LENGTHS = 64  # canvases of few distinct lengths have multiples of this


class DecodingError(UserError):
    """Prompts or a model cannot be decoded; the message names the reason and the remedy."""


@dataclass(frozen=True)
class Generation:
    """A decoded response.

    Attributes:
        tokens: `gen_length` token ids; positions after an early stop hold the end-of-sequence token.
        commit_step: the forward pass (from 0) that committed each token; in the mode `revising`, the last one
            that changed it. The input of forward pass s is `where(commit_step < s, tokens, mask)`; in
            `revising`, or behind an end token with `eos_fill`, some of these masks are earlier
            tokens.
        confidence: probability of each token by that forward pass; 0 for end-of-sequence tokens filled in
            without a prediction.
        nfe: number of forward passes of this row.
        num_tokens: number of tokens up to and including the first end-of-sequence or end-of-turn token, or
            the token that completes a stop text.
    """

    tokens: list[int]
    commit_step: list[int]
    confidence: list[float]
    nfe: int
    num_tokens: int


@dataclass(frozen=True)
class Step:
    """What a forward pass did to a row.

    Attributes:
        row: index of the prompt.
        denoise_step: the row's forward pass, from 0 as in `commit_step`.
        done: whether it was the last one of the row.
        offsets: response positions read: the masked positions of open blocks; in the mode `revising`, all
            positions of the active block.
        tokens, probability, entropy: prediction for each offset; entropy in nats.
        commit: whether this forward pass committed the token at each offset: in `revising`, whether the token
            is new there, at a masked position or in place of another token.
    """

    row: int
    denoise_step: int
    done: bool
    offsets: list[int]
    tokens: list[int]
    probability: list[float]
    entropy: list[float]
    commit: list[bool]


@dataclass
class Canvas:
    """The canvases: `tokens[row]` is prompt, `gen_length` response positions, and unattended padding.

    In an infill the response positions are those of the gaps, which lie within `prompt_length` tokens.
    The host keeps them, since a forward pass changes few positions, and writing these one by one on a device
    takes longer than a small model's forward pass. Integers are int64.
    """

    tokens: np.ndarray  # (N, L)
    prompt_length: np.ndarray  # (N,)
    commit_step: np.ndarray  # (N, G), -1 while masked
    confidence: np.ndarray  # (N, G) float32
    nfe: np.ndarray  # (N,)
    opened: np.ndarray  # (N,) number of open blocks
    block_forwards: np.ndarray  # (N,) forward passes since the last block was opened
    rounds_left: np.ndarray  # (N, K) further forward passes that include a complete block
    seen: np.ndarray  # (N, G) bool, whether a forward has read the position
    seed: np.ndarray  # (N,)
    response_length: np.ndarray  # (N,) tokens up to a stop text; G without one
    full: np.ndarray  # (N,) bool, whether the next forward pass recomputes the whole canvas
    done: np.ndarray  # (N,) bool, whether the row is finished
    gaps: np.ndarray | None = None  # (N, G) canvas position of each response position of an infill

    @classmethod
    def start(
        cls,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        decoding: DecodingConfig,
        config: DiffusionConfig,
        room: int | None = None,
    ) -> "Canvas":
        """Fully masked canvases for `prompts`, with a seed per row for sampling.

        Args:
            room: positions behind the longest prompt, by default `gen_length`.
        """
        rows = len(prompts)
        length = max(map(len, prompts)) + (decoding.gen_length if room is None else room)
        if decoding.compile:  # few distinct sizes
            length = rounded_up(length)
        tokens = np.full((rows, length), config.mask_token_id, dtype=np.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        zeros = np.zeros(rows, dtype=np.int64)
        return cls(
            tokens=tokens,
            prompt_length=np.array([len(prompt) for prompt in prompts], dtype=np.int64),
            commit_step=np.full((rows, decoding.gen_length), -1, dtype=np.int64),
            confidence=np.zeros((rows, decoding.gen_length), dtype=np.float32),
            nfe=zeros,
            opened=zeros + 1,
            block_forwards=zeros.copy(),
            rounds_left=np.full((rows, decoding.blocks), settle_rounds(decoding), dtype=np.int64),
            seen=np.zeros((rows, decoding.gen_length), dtype=bool),
            seed=np.array(seeds, dtype=np.int64),
            response_length=zeros + decoding.gen_length,
            full=np.ones(rows, dtype=bool),
            done=np.zeros(rows, dtype=bool),
        )

    def put(self, row: int, other: "Canvas") -> None:
        """Write the only row of another canvas, which is not longer, at `row`."""
        for name, state in other.__dict__.items():
            if state is not None and state.ndim == 1:
                getattr(self, name)[row] = state[0]
            elif state is not None:
                getattr(self, name)[row, : state.shape[1]] = state[0]

    def grow(self, rows: int, length: int) -> None:
        """Make room for `rows` rows of `length` positions; keeps the state of all rows."""
        for name, state in self.__dict__.items():
            if state is not None:
                width = (length,) if name == "tokens" else state.shape[1:]
                larger = np.zeros((rows, *width), dtype=state.dtype)
                larger[tuple(slice(size) for size in state.shape)] = state
                setattr(self, name, larger)

    @property
    def room(self) -> int:
        """Positions of a row behind its `prompt_length`."""
        return self.commit_step.shape[1] if self.gaps is None else 0

    def positions(self, rows: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """The canvas positions (b, n) of the response positions `offsets` (b, n) or (n,) of `rows` (b,)."""
        if self.gaps is None:
            return self.prompt_length[rows, None] + offsets
        return self.gaps[rows[:, None], offsets]

    def responses(self, rows: np.ndarray) -> np.ndarray:
        """The tokens at the response positions of `rows` (b,), (b, G)."""
        return self.tokens[rows[:, None], self.positions(rows, np.arange(self.commit_step.shape[1]))]

    def generations(self, rows: np.ndarray, end_token_ids: Sequence[int]) -> list[Generation]:
        """The responses of `rows` (b,); DecodingError if predictions were not finite."""
        if not np.isfinite(self.confidence[rows]).all():
            raise DecodingError("the model's logits are NaN or infinite: its weights are damaged or diverged")
        state = (self.commit_step, self.confidence, self.nfe, self.response_length)
        columns = (self.responses(rows), *(column[rows] for column in state))
        return [
            Generation(tokens, steps, confidence, nfe, min(_count(tokens, end_token_ids), length))
            for tokens, steps, confidence, nfe, length in zip(
                *(column.tolist() for column in columns), strict=True
            )
        ]


def rounded_up(length: int) -> int:
    """The next length of canvases that have few distinct ones."""
    return -(-length // LENGTHS) * LENGTHS


def tokens_per_forward(num_tokens: Sequence[int], nfe: Sequence[int]) -> float:
    """TPF: tokens including the end token / forward passes, each summed over all sequences first."""
    return sum(num_tokens) / sum(nfe)


def settle_rounds(decoding: DecodingConfig) -> int:
    """Forward passes that still include a complete block; in the pipeline, the last one fills the cache."""
    return 1 if decoding.mode == "pipelined" else decoding.revision_passes or decoding.settle_rounds or 0


def _count(response: list[int], end_token_ids: Sequence[int]) -> int:
    """Number of tokens including the first end token; all tokens if there is none."""
    return min(
        (response.index(token) + 1 for token in end_token_ids if token in response), default=len(response)
    )
