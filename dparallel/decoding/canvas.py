"""The state of a batch while it is decoded.

Legend: B rows, L canvas length of the longest row, G `gen_length`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dparallel.models.backbone import DiffusionTransformer


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
        num_tokens: tokens up to and with the first end-of-text.
    """

    tokens: list[int]
    commit_step: list[int]
    confidence: list[float]
    nfe: int
    num_tokens: int


@dataclass
class Canvas:
    """`tokens[row]` is the prompt, `gen_length` response positions, then padding nobody sees."""

    tokens: Tensor  # (B, L)
    visible: Tensor | None  # (B, L) bool, None where no row is padded
    response: Tensor  # (B, G) where each row's response lies
    commit_step: Tensor  # (B, G), -1 while masked
    confidence: Tensor  # (B, G) float32
    nfe: Tensor  # (B,)
    mask_token_id: int
    eos_token_id: int | None

    @classmethod
    def start(
        cls, prompts: Sequence[Sequence[int]], gen_length: int, model: DiffusionTransformer
    ) -> "Canvas":
        config, device = model.config, model.device
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths.max()) + gen_length
        tokens = torch.full((len(prompts), longest), config.mask_token_id)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        visible = torch.arange(longest) < (lengths + gen_length)[:, None]
        return cls(
            tokens=tokens.to(device),
            visible=None if visible.all() else visible.to(device),
            response=(lengths[:, None] + torch.arange(gen_length)).to(device),
            commit_step=torch.full((len(prompts), gen_length), -1, device=device),
            confidence=torch.zeros(len(prompts), gen_length, device=device),
            nfe=torch.zeros(len(prompts), dtype=torch.long, device=device),
            mask_token_id=config.mask_token_id,
            eos_token_id=config.eos_token_id,
        )

    def commit(
        self, rows: Tensor, offsets: Tensor, commit: Tensor, token: Tensor, probability: Tensor
    ) -> None:
        """Fix `token` where `commit`; all (b, l), at response `offsets` of `rows` (b,)."""
        where = rows[:, None].expand_as(offsets)[commit], offsets[commit]
        self.tokens[where[0], self.response[where]] = token[commit]
        self.confidence[where] = probability[commit]
        self.commit_step[where] = self.nfe[where[0]]

    def ended(self, rows: Tensor) -> Tensor:
        """Whether an end-of-text token and all before it are committed, (b,) bool."""
        before_is_done = (self.commit_step[rows] >= 0).cumprod(dim=1).bool()  # (b, G)
        response = self.tokens[rows[:, None], self.response[rows]]
        return (before_is_done & (response == self.eos_token_id)).any(dim=1)

    def fill_with_eos(self, rows: Tensor) -> None:
        """Commit end-of-text, as part of the last forward, wherever `rows` (b,) are masked."""
        open_row, open_offset = (self.commit_step[rows] < 0).nonzero(as_tuple=True)
        where = rows[open_row], open_offset
        self.tokens[where[0], self.response[where]] = self.eos_token_id  # type: ignore[assignment]
        self.commit_step[where] = self.nfe[where[0]] - 1

    def generations(self) -> list[Generation]:
        """The finished rows; a ValueError where the model's predictions were not numbers."""
        if not self.confidence.isfinite().all():
            raise ValueError("the model's logits are NaN or infinite: its weights are damaged or diverged")
        tokens = self.tokens.gather(1, self.response)  # (B, G)
        rows = zip(
            tokens.tolist(),
            self.commit_step.tolist(),
            self.confidence.tolist(),
            self.nfe.tolist(),
            strict=True,
        )
        return [
            Generation(response, steps, confidence, nfe, self._count(response))
            for response, steps, confidence, nfe in rows
        ]

    def _count(self, response: list[int]) -> int:
        if self.eos_token_id in response:
            return response.index(self.eos_token_id) + 1
        return len(response)
