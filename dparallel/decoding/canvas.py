"""The state of all rows of one `generate` call, and what comes out of it.

Legend: N rows, b of them in a forward, L canvas length of the longest row, G `gen_length`, K blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dparallel.config.base import UserError
from dparallel.config.decoding import DecodingConfig
from dparallel.models.backbone import DiffusionConfig

LENGTHS = 64  # compiled steps know canvas lengths that are multiples of this


class DecodingError(UserError):
    """Prompts or a model that cannot be decoded; the message says why and what to change."""


@dataclass(frozen=True)
class Generation:
    """One decoded response.

    Attributes:
        tokens: `gen_length` ids; after an early stop the rest is end-of-text.
        commit_step: for each token the forward (0-based) that fixed it. The canvas that forward
            s saw is `where(commit_step < s, tokens, mask)`.
        confidence: probability of each token when it was committed; 0 where end-of-text was
            filled in without a prediction.
        nfe: forwards spent on this row.
        num_tokens: tokens up to and with the first end of text or turn.
    """

    tokens: list[int]
    commit_step: list[int]
    confidence: list[float]
    nfe: int
    num_tokens: int


@dataclass(frozen=True)
class Step:
    """What one forward did to one row.

    Attributes:
        row: which prompt.
        denoise_step: the row's forward, 0-based, as `commit_step` counts.
        done: whether it was the row's last.
        offsets: the response positions read: masked, in an open block.
        tokens, probability, entropy: the prediction at each offset; entropy in nats.
        commit: whether this forward fixed it.
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
    """`tokens[row]` is the prompt, `gen_length` response positions, then padding that nothing attends to."""

    tokens: Tensor  # (N, L)
    prompt_length: Tensor  # (N,)
    commit_step: Tensor  # (N, G), -1 while masked
    confidence: Tensor  # (N, G) float32
    nfe: Tensor  # (N,)
    opened: Tensor  # (N,) blocks open
    block_forwards: Tensor  # (N,) forwards since the last block was opened
    rounds_left: Tensor  # (N, K) forwards a full block still takes part in
    seen: Tensor  # (N, G) bool, whether a forward has read the position
    seed: Tensor  # (N,)

    @classmethod
    def start(
        cls,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        decoding: DecodingConfig,
        config: DiffusionConfig,
        device: torch.device,
    ) -> "Canvas":
        rows, length = len(prompts), max(map(len, prompts)) + decoding.gen_length
        if decoding.compile:  # few different sizes, and at least one spare row
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
            rounds_left=torch.full((rows, decoding.blocks), _settle_rounds(decoding), device=device),
            seen=torch.zeros(rows, decoding.gen_length, dtype=torch.bool, device=device),
            seed=_padded(seeds, rows, device),
        )

    def gather(self, rows: Tensor) -> "Canvas":
        """The state of `rows` (b,), as a copy."""
        return Canvas(**{name: getattr(self, name).index_select(0, rows) for name in STATE})

    def scatter(self, rows: Tensor, state: "Canvas") -> None:
        """Put back the state of `rows` (b,), in place."""
        for name in STATE:
            getattr(self, name).index_copy_(0, rows, getattr(state, name))

    def generations(self, count: int, end_token_ids: Sequence[int]) -> list[Generation]:
        """The first `count` rows, decoded; a DecodingError where the predictions were not numbers."""
        if not self.confidence[:count].isfinite().all():
            raise DecodingError("the model's logits are NaN or infinite: its weights are damaged or diverged")
        offsets = torch.arange(self.commit_step.shape[1], device=self.tokens.device)
        responses = self.tokens.gather(1, self.prompt_length[:, None] + offsets)  # (N, G)
        columns = (responses, self.commit_step, self.confidence, self.nfe)
        rows = zip(*(column[:count].tolist() for column in columns), strict=True)
        return [
            Generation(tokens, steps, confidence, nfe, _count(tokens, end_token_ids))
            for tokens, steps, confidence, nfe in rows
        ]


STATE = tuple(field.name for field in fields(Canvas))  # what a row consists of


def tokens_per_forward(num_tokens: Sequence[int], nfe: Sequence[int]) -> float:
    """TPF: generated tokens up to and with EOS over forwards, both summed over sequences first."""
    return sum(num_tokens) / sum(nfe)


def _settle_rounds(decoding: DecodingConfig) -> int:
    """Forwards a full block still takes part in; the pipeline's last one computes what is then cached."""
    return 1 if decoding.mode == "pipelined" else decoding.settle_rounds or 0


def _padded(values: Sequence[int], rows: int, device: torch.device) -> Tensor:
    return torch.tensor([*values, *[0] * (rows - len(values))], device=device)


def _count(response: list[int], end_token_ids: Sequence[int]) -> int:
    """Tokens up to and with the first that ends the response; all of them where none does."""
    return min(
        (response.index(each) + 1 for each in end_token_ids if each in response), default=len(response)
    )
