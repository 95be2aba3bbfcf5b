"""The bidirectional transformer of all masked diffusion language models of this package.

RMSNorm, SwiGLU, rotary embeddings, grouped key/value heads, and optionally biases of queries, keys and
values, norms of queries and keys, and heads of another size than hidden size / heads. This file imports
nothing from the package, so that a saved checkpoint can include it as its model code and load with plain
`transformers` (`trust_remote_code=True`).

Legend: B rows, L canvas length, M keys, V vocabulary, D hidden size, H heads, E key/value heads, n positions
for which the last layer and the head are computed.
"""

from collections.abc import Sequence
from functools import cache as cached
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


class DiffusionConfig(PretrainedConfig):
    """Shape and special tokens of a masked diffusion language model.

    Attributes:
        head_dim: size of a head; None for hidden size / heads.
        qk_norm: whether queries and keys are normalized per head, before they are rotated.
        family: the ecosystem of the weights (`tiny`, `llada`, `dream`); only the checkpoint formats use it.
        predicts_next: whether the weights predict the next position's token at each position. The model
            shifts its logits accordingly, so they are aligned in either case.
        attention_pattern: which positions each position attended to in training: `full`, `block_causal` or
            `causal`; None if the checkpoint does not state it, as published block-causal ones do not. The
            callers choose the pattern; the model does not apply it by itself.
        end_token_ids: tokens that end a response: end of sequence and end of turn.
        eos_token_id: the first of `end_token_ids`; fills the positions after the end of a response.
    """

    model_type = "dparallel"

    def __init__(
        self,
        vocab_size: int = 64,
        hidden_size: int = 128,
        intermediate_size: int = 320,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        max_position_embeddings: int = 128,
        rope_theta: float = 10_000.0,
        rms_norm_eps: float = 1e-5,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        tie_word_embeddings: bool = False,
        mask_token_id: int = -1,  # must be set: load_model and generate reject -1
        eos_token_id: int | Sequence[int] | None = None,
        end_token_ids: Sequence[int] = (),
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        family: str = "tiny",
        predicts_next: bool = False,
        attention_pattern: str | None = None,
        initializer_range: float = 0.02,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        self.mask_token_id = mask_token_id
        self.family = family
        self.predicts_next = predicts_next
        self.attention_pattern = attention_pattern
        self.initializer_range = initializer_range
        named = [eos_token_id] if isinstance(eos_token_id, int) else [*(eos_token_id or ())]
        self.end_token_ids = tuple(dict.fromkeys([*named, *end_token_ids]))
        super().__init__(
            eos_token_id=next(iter(self.end_token_ids), None),  # type: ignore[call-arg]
            pad_token_id=pad_token_id,  # type: ignore[call-arg]
            bos_token_id=bos_token_id,  # type: ignore[call-arg]
            tie_word_embeddings=tie_word_embeddings,  # type: ignore[call-arg]
            **kwargs,
        )

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def query_size(self) -> int:
        """Width of the queries of all heads, and of what attention returns."""
        return self.head_size * self.num_attention_heads

    @property
    def key_value_size(self) -> int:
        """Width of the keys of all heads, and of the values."""
        return self.head_size * self.num_key_value_heads


def at_least_float32(values: Tensor) -> Tensor:
    """Convert to float32, unless the dtype is wider."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


class RMSNorm(nn.Module):
    """Root mean square normalization, computed in float32 or wider."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        # The weight is applied after rounding to the dtype of `hidden`; it may be stored wider.
        return (self.weight * F.rms_norm(hidden, self.weight.shape, eps=self.eps)).to(hidden.dtype)


Rotary = tuple[Tensor, Tensor]  # cosines and signed sines


def rotary_tables(positions: Tensor, head_size: int, theta: float) -> Rotary:
    """Tables for `positions` (..., L), each (..., 1, L, head_size), in float32.

    The second one holds the sines, those of the first half of a head with a negative sign.
    """
    half = torch.arange(0, head_size, 2, dtype=torch.float32, device=positions.device)
    angles = (positions.float()[..., None] / theta ** (half / head_size)).unsqueeze(-3)
    cos, sin = angles.cos(), angles.sin()  # (..., 1, L, head_size / 2)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(heads: Tensor, rotary: Rotary) -> Tensor:
    """Apply rotary embeddings to `heads` (B, H, L, head_size), in float32 or wider like the references."""
    cos, sin = rotary
    wide = at_least_float32(heads)
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([second, first], dim=-1) * sin).to(heads.dtype)


def rotary_at(rotary: Rotary, index: Tensor) -> Rotary:
    """The tables (B or none, 1, L, head_size) at `index` (B, n), each (B, 1, n, head_size)."""
    cos, sin = (table.flatten(0, -3).expand(len(index), -1, -1) for table in rotary)
    return pick(cos, index)[:, None], pick(sin, index)[:, None]


class Cache(Protocol):
    """Stores the keys and values (B, E, L, head_size) of each layer and returns those to attend to."""

    length: int

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]: ...


def pick(values: Tensor, index: Tensor) -> Tensor:
    """Select `values` (B, L, D) at `index` (B, n); returns (B, n, D)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


class Reads(NamedTuple):
    """The positions `at` (B, n) for which the last layer is computed, with their rotary tables and mask."""

    at: Tensor
    rotary: Rotary
    visible: Tensor | None


# An attention mask: bool (B, 1, L or 1, M), or a block mask whose empty blocks are skipped.
Visible = Tensor | BlockMask | None


def attend(query: Tensor, key: Tensor, value: Tensor, visible: Visible) -> Tensor:
    """Attention of `query` (B, H, L, head_size) to keys and values (B, E, M, head_size); E divides H."""
    grouped = query.shape[1] != key.shape[1]
    if isinstance(visible, BlockMask):
        return _block_sparse(query.device.type)(query, key, value, block_mask=visible, enable_gqa=grouped)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=grouped)


@cached
def _block_sparse(device: str) -> Any:
    """Flex attention, compiled on GPUs, where the compiled kernel skips empty blocks."""
    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention


class Attention(nn.Module):
    """Self-attention with grouped key/value heads."""

    def __init__(self, config: DiffusionConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_size = config.head_size
        size, kv_size = config.query_size, config.key_value_size
        self.q_proj = nn.Linear(config.hidden_size, size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(size, config.hidden_size, bias=False)
        normalized = config.qk_norm
        self.q_norm = RMSNorm(self.head_size, config.rms_norm_eps) if normalized else nn.Identity()
        self.k_norm = RMSNorm(self.head_size, config.rms_norm_eps) if normalized else nn.Identity()

    def forward(
        self,
        hidden: Tensor,
        rotary: Rotary,
        visible: Visible,
        cache: Cache | None,
        reads: Reads | None,
    ) -> Tensor:
        key = rotate(self.k_norm(self._split(self.k_proj(hidden))), rotary)
        value = self._split(self.v_proj(hidden))
        if cache is not None:
            key, value = cache.update(self.layer, key, value)
        if reads is not None:
            hidden, rotary, visible = pick(hidden, reads.at), reads.rotary, reads.visible
        query = rotate(self.q_norm(self._split(self.q_proj(hidden))), rotary)
        mixed = attend(query, key, value, visible)  # (B, H, L or n, head_size)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _split(self, hidden: Tensor) -> Tensor:
        return hidden.view(*hidden.shape[:2], -1, self.head_size).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU feed-forward network."""

    def __init__(self, config: DiffusionConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Layer(GradientCheckpointingLayer):
    """A pre-norm transformer layer."""

    def __init__(self, config: DiffusionConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        hidden: Tensor,
        rotary: Rotary,
        visible: Visible,
        cache: Cache | None = None,
        reads: Reads | None = None,
    ) -> Tensor:
        mixed = self.attention(self.attention_norm(hidden), rotary, visible, cache, reads)
        hidden = mixed + (hidden if reads is None else pick(hidden, reads.at))
        return hidden + self.feed_forward(self.feed_forward_norm(hidden))


class DiffusionTransformer(PreTrainedModel):
    """Bidirectional transformer with aligned logits: `logits[:, i]` predicts token i."""

    config: DiffusionConfig
    config_class = DiffusionConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Layer"]
    _tied_weights_keys = {"lm_head.weight": "embedding.weight"}
    defaults: Any = None  # decode defaults of the checkpoint, as `load_model` reads them
    commit_rule: Any = (
        None  # the weights of a commit rule fitted for this model, if the checkpoint holds some
    )

    def __init__(self, config: DiffusionConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        logits_at: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        levels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Predict the tokens of all positions at once.

        Args:
            input_ids: (B, L) token ids; masked positions hold `config.mask_token_id`.
            attention_mask: None (full attention), bool (B, M) with False at padding keys, or bool
                (B, L, M) (query, key). M is L, or the cache's length. Every query needs at least one key.
            logits_at: None for all positions; int64 (B, n) indices into each row of `input_ids`; or bool
                (B, L), whose N true positions are returned in row-major order. The head and most of the
                last layer are computed at these positions only.
            positions: int64 (B, L), canvas positions of `input_ids`; default 0 to L - 1. With
                `predicts_next`, each position of `logits_at` must be preceded by its left neighbour.
            cache: keys and values of further positions to attend to.
            levels: alternative to `attention_mask`, int64 (B, M): a position attends to its own and lower
                levels. In training on a GPU, the kernel skips blocks without attention.
            inputs_embeds: (B, L, D) embeddings to compute with instead of those of `input_ids`.

        Returns:
            Logits (B, L, V), (B, n, V) or (N, V).

        Raises:
            ValueError: shapes or dtypes of the masks do not fit, or both kinds of mask are given.
        """
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        rotary = rotary_tables(positions, self.config.head_size, self.config.rope_theta)
        keys = input_ids.shape[1] if cache is None else cache.length
        mask = own = None
        if levels is None:
            visible: Visible = (mask := visible_keys(attention_mask, input_ids, keys))
        else:
            check_levels(levels, attention_mask, input_ids, keys)
            own = levels if cache is None else levels.gather(1, positions.expand(input_ids.shape))
            skips = self.training and cache is None and input_ids.is_cuda
            visible = level_block_mask(levels) if skips else lower_levels(levels, own)
        hidden = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds  # (B, L, D)
        for layer in self.layers[:-1]:
            hidden = layer(hidden, rotary, visible, cache)
        reads = valid = None
        if logits_at is not None and logits_at.dtype == torch.bool:
            logits_at, valid = _indices(logits_at)
        if logits_at is not None:
            if self.config.predicts_next:
                logits_at = (logits_at - 1).clamp(min=0)
            if levels is None or own is None:
                seen = _rows_of(mask, logits_at)
            else:
                seen = lower_levels(levels, own.gather(1, logits_at))
            reads = Reads(logits_at, rotary_at(rotary, logits_at), seen)
        hidden = self.layers[-1](hidden, rotary, visible, cache, reads)
        if reads is None and self.config.predicts_next:
            hidden = torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1)
        if valid is not None:
            hidden = hidden[valid]  # (N, D)
        return self.lm_head(self.norm(hidden))


def visible_keys(attention_mask: Tensor | None, input_ids: Tensor, keys: int) -> Tensor | None:
    """Convert either kind of mask to the bool form (B, 1, L or 1, M) of SDPA."""
    if attention_mask is None:
        return None
    rows, length = input_ids.shape
    if attention_mask.is_floating_point():
        raise ValueError(f"attention_mask is {attention_mask.dtype}; give bool, True for keys to attend to")
    if attention_mask.shape == (rows, keys):
        return attention_mask.bool()[:, None, None, :]
    if attention_mask.shape == (rows, length, keys):
        return attention_mask.bool()[:, None]
    raise ValueError(
        f"attention_mask has shape {tuple(attention_mask.shape)}; for input_ids of shape "
        f"{(rows, length)} give (B, L) = {(rows, keys)} or (B, L, L) = {(rows, length, keys)}"
    )


def check_levels(levels: Tensor, attention_mask: Tensor | None, input_ids: Tensor, keys: int) -> None:
    """Raise a ValueError if `levels` does not fit the input, or a mask is given as well."""
    if attention_mask is not None:
        raise ValueError("attention_mask and levels: give one of them; padding is a level above all others")
    if levels.shape != (len(input_ids), keys):
        raise ValueError(f"levels has shape {tuple(levels.shape)}; give (B, M) = {(len(input_ids), keys)}")


def lower_levels(levels: Tensor, own: Tensor) -> Tensor:
    """Bool (B, 1, n, M): queries of levels `own` (B, n) attend to keys of levels not above theirs (B, M)."""
    return (levels[:, None, :] <= own[:, :, None])[:, None]


def level_block_mask(levels: Tensor) -> BlockMask:
    """Block mask of `lower_levels` for all queries (n = M), which marks blocks without attention."""

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return levels[row, key] <= levels[row, query]

    rows, length = levels.shape
    return create_block_mask(seen, rows, None, length, length, device=str(levels.device))


def _indices(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the true positions of bool (B, L), int64 (B, n), and their validity, bool (B, n)."""
    counts = chosen.sum(dim=1)
    n = max(1, int(counts.max()))
    at = chosen.int().argsort(dim=1, descending=True, stable=True)[:, :n]
    return at, torch.arange(n, device=chosen.device) < counts[:, None]


def _rows_of(mask: Tensor | None, index: Tensor) -> Tensor | None:
    """The rows `index` (B, n) of a mask (B, 1, L or 1, M)."""
    if mask is None or mask.shape[2] == 1:
        return mask
    return pick(mask[:, 0], index)[:, None]
