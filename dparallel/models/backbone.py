"""One bidirectional transformer for every masked diffusion language model here.

RMSNorm, SwiGLU, rotary positions, optional q/k/v bias and grouped key/value heads. The file
imports nothing of this package, so that a saved checkpoint can carry it as its own model code
and load with plain `transformers` (`trust_remote_code=True`).

Legend: B rows, L canvas length, V vocabulary, D hidden size, H heads, n positions read.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


class DiffusionConfig(PretrainedConfig):
    """Shape and special tokens of a masked diffusion language model.

    `family` says which ecosystem the weights come from (`tiny`, `llada`, `dream`); nothing but
    the checkpoint adapters looks at it.
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
        max_position_embeddings: int = 128,
        rope_theta: float = 10_000.0,
        rms_norm_eps: float = 1e-5,
        qkv_bias: bool = False,
        tie_word_embeddings: bool = False,
        mask_token_id: int = -1,  # no default makes sense: load_model and generate refuse this one
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        family: str = "tiny",
        initializer_range: float = 0.02,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.qkv_bias = qkv_bias
        self.mask_token_id = mask_token_id
        self.family = family
        self.initializer_range = initializer_range
        super().__init__(
            eos_token_id=eos_token_id,  # type: ignore[call-arg]
            pad_token_id=pad_token_id,  # type: ignore[call-arg]
            bos_token_id=bos_token_id,  # type: ignore[call-arg]
            tie_word_embeddings=tie_word_embeddings,  # type: ignore[call-arg]
            **kwargs,
        )


def at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        wide = at_least_float32(hidden)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(hidden.dtype)


def rotary_tables(positions: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables, (L, head_size) each, in float32."""
    half = torch.arange(0, head_size, 2, dtype=torch.float32, device=positions.device)
    angles = positions.float()[:, None] / theta ** (half / head_size)  # (L, head_size / 2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to (B, H, L, head_size), in float32 or better as the references do."""
    wide = at_least_float32(heads)
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(heads.dtype)


class Attention(nn.Module):
    def __init__(self, config: DiffusionConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_size = config.hidden_size // self.heads
        kv_size = self.kv_heads * self.head_size
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        rows, length, _ = hidden.shape
        split = (rows, length, -1, self.head_size)
        query = rotate(self.q_proj(hidden).view(split).transpose(1, 2), cos, sin)
        key = rotate(self.k_proj(hidden).view(split).transpose(1, 2), cos, sin)
        value = self.v_proj(hidden).view(split).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, enable_gqa=self.kv_heads != self.heads
        )  # (B, H, L, head_size)
        return self.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1))


class FeedForward(nn.Module):
    def __init__(self, config: DiffusionConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Layer(GradientCheckpointingLayer):
    def __init__(self, config: DiffusionConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), cos, sin, mask)
        return hidden + self.feed_forward(self.feed_forward_norm(hidden))


class DiffusionTransformer(PreTrainedModel):
    """Bidirectional transformer whose logits are aligned: `logits[:, i]` predicts token i."""

    config: DiffusionConfig
    config_class = DiffusionConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Layer"]
    _tied_weights_keys = {"lm_head.weight": "embedding.weight"}

    def __init__(self, config: DiffusionConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
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
    ) -> Tensor:
        """Predict every token at once.

        Args:
            input_ids: (B, L) token ids; masks are `config.mask_token_id`.
            attention_mask: None (all see all), bool (B, L) key padding (True = may be seen),
                or bool (B, L, L) (query, key). Every query needs at least one key.
            logits_at: None for all positions; int64 (B, n) positions per row; or bool (B, L),
                whose N true positions are read in row-major order. The head runs only there.

        Returns:
            Logits (B, L, V), (B, n, V) or (N, V).
        """
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        head_size = self.config.hidden_size // self.config.num_attention_heads
        cos, sin = rotary_tables(positions, head_size, self.config.rope_theta)
        mask = _attention_bias(attention_mask, input_ids)
        hidden = self.embedding(input_ids)  # (B, L, D)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, mask)
        return self.lm_head(self.norm(_read(hidden, logits_at)))


def _attention_bias(attention_mask: Tensor | None, input_ids: Tensor) -> Tensor | None:
    """Bring either kind of mask into the (B, 1, L or 1, L) bool form of SDPA."""
    if attention_mask is None:
        return None
    rows, length = input_ids.shape
    if attention_mask.is_floating_point():
        raise ValueError(f"attention_mask is {attention_mask.dtype}; give bool, True where it may be seen")
    if attention_mask.shape == (rows, length):
        return attention_mask.bool()[:, None, None, :]
    if attention_mask.shape == (rows, length, length):
        return attention_mask.bool()[:, None]
    raise ValueError(
        f"attention_mask has shape {tuple(attention_mask.shape)}; for input_ids of shape "
        f"{(rows, length)} give (B, L) = {(rows, length)} or (B, L, L) = {(rows, length, length)}"
    )


def _read(hidden: Tensor, logits_at: Tensor | None) -> Tensor:
    if logits_at is None:
        return hidden
    if logits_at.dtype == torch.bool:
        return hidden[logits_at]  # (N, D)
    index = logits_at[..., None].expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, index)  # (B, n, D)
