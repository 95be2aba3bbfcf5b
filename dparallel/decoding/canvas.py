"""State of all rows of a `generate` call, and its results.

Legend: N rows, b rows of a forward pass, L canvas length of the longest row, G `gen_length`, K blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dparallel.config.base import UserError
from dparallel.config.decoding import DecodingConfig
from dparallel.models.backbone import DiffusionConfig

LENGTHS = 64  # compiled steps use canvas lengths that are multiples of this


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
    """

    tokens: Tensor  # (N, L)
    prompt_length: Tensor  # (N,)
    commit_step: Tensor  # (N, G), -1 while masked
    confidence: Tensor  # (N, G) float32
    nfe: Tensor  # (N,)
    opened: Tensor  # (N,) number of open blocks
    block_forwards: Tensor  # (N,) forward passes since the last block was opened
    rounds_left: Tensor  # (N, K) further forward passes that include a complete block
    seen: Tensor  # (N, G) bool, whether a forward has read the position
    seed: Tensor  # (N,)
    response_length: Tensor  # (N,) tokens up to a stop text; G without one
    gaps: Tensor | None = None  # (N, G) canvas position of each response position of an infill

    @classmethod
    def start(
        cls,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        decoding: DecodingConfig,
        config: DiffusionConfig,
        device: torch.device,
        room: int | None = None,
    ) -> "Canvas":
        """Fully masked canvases for `prompts`, with a seed per row for sampling.

        Args:
            room: positions behind the longest prompt, by default `gen_length`.
        """
        rows = len(prompts)
        length = max(map(len, prompts)) + (decoding.gen_length if room is None else room)
        if decoding.compile:  # few distinct sizes, and at least one spare row
            rows, length = 1 << rows.bit_length(), -(-length // LENGTHS) * LENGTHS
        tokens = torch.full((rows, length), config.mask_token_id)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        zeros = torch.zeros(rows, dtype=torch.long, device=device)
        return cls(
            tokens=tokens.to(device),
            prompt_length=_padded([len(prompt) for prompt in prompts], rows, device),
            commit_step=torch.full((rows, decoding.gen_length), -1, device=device),
            confidence=torch.zeros(rows, decoding.gen_length, device=device),
            nfe=zeros,
            opened=zeros + 1,
            block_forwards=zeros.clone(),
            rounds_left=torch.full((rows, decoding.blocks), settle_rounds(decoding), device=device),
            seen=torch.zeros(rows, decoding.gen_length, dtype=torch.bool, device=device),
            seed=_padded(seeds, rows, device),
            response_length=zeros + decoding.gen_length,
        )

    @property
    def state(self) -> tuple[str, ...]:
        """The fields of a row that there are."""
        return tuple(name for name in STATE if getattr(self, name) is not None)

    @property
    def room(self) -> int:
        """Positions of a row behind its `prompt_length`."""
        return self.commit_step.shape[1] if self.gaps is None else 0

    def positions(self, offsets: Tensor) -> Tensor:
        """The canvas positions (b, n) of the response positions `offsets` (b, n) or (n,)."""
        if self.gaps is None:
            return self.prompt_length[:, None] + offsets
        return self.gaps.gather(1, offsets.expand(len(self.gaps), -1))

    def gather(self, rows: Tensor) -> "Canvas":
        """A copy of the state of `rows` (b,)."""
        return Canvas(**{name: getattr(self, name).index_select(0, rows) for name in self.state})

    def scatter(self, rows: Tensor, state: "Canvas") -> None:
        """Write the state of `rows` (b,) back, in place."""
        for name in self.state:
            getattr(self, name).index_copy_(0, rows, getattr(state, name))

    def generations(self, count: int, end_token_ids: Sequence[int]) -> list[Generation]:
        """The responses of the first `count` rows; DecodingError if predictions were not finite."""
        if not self.confidence[:count].isfinite().all():
            raise DecodingError("the model's logits are NaN or infinite: its weights are damaged or diverged")
        offsets = torch.arange(self.commit_step.shape[1], device=self.tokens.device)
        responses = self.tokens.gather(1, self.positions(offsets))  # (N, G)
        columns = (responses, self.commit_step, self.confidence, self.nfe, self.response_length)
        rows = zip(*(column[:count].tolist() for column in columns), strict=True)
        return [
            Generation(tokens, steps, confidence, nfe, min(_count(tokens, end_token_ids), length))
            for tokens, steps, confidence, nfe, length in rows
        ]


STATE = tuple(field.name for field in fields(Canvas))  # the fields of a row


def tokens_per_forward(num_tokens: Sequence[int], nfe: Sequence[int]) -> float:
    """TPF: tokens including the end token / forward passes, each summed over all sequences first."""
    return sum(num_tokens) / sum(nfe)


def settle_rounds(decoding: DecodingConfig) -> int:
    """Forward passes that still include a complete block; in the pipeline, the last one fills the cache."""
    return 1 if decoding.mode == "pipelined" else decoding.revision_passes or decoding.settle_rounds or 0


def _padded(values: Sequence[int], rows: int, device: torch.device) -> Tensor:
    return torch.tensor([*values, *[0] * (rows - len(values))], device=device)


def _count(response: list[int], end_token_ids: Sequence[int]) -> int:
    """Number of tokens including the first end token; all tokens if there is none."""
    return min(
        (response.index(token) + 1 for token in end_token_ids if token in response), default=len(response)
    )
