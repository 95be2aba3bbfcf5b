"""Estimate the training memory of each GPU, by kind, from shapes alone.

Legend: B views per forward pass, L canvas length, T = B L tokens, N positions read, D hidden size, E width
of all key/value heads, F feed-forward size, V vocabulary, H heads, r LoRA rank, w bytes per value.
"""

from dataclasses import asdict, dataclass

import torch
from torch import nn

from dparallel.config.experiment import LoraSettings, TrainingConfig
from dparallel.distillation.losses import CHUNK_BYTES
from dparallel.distillation.quantization import BLOCK
from dparallel.distillation.settings import (
    REDUCE_BUCKET_SIZE,
    offloads_optimizer,
    offloads_weights,
    zero_stage,
)
from dparallel.models.backbone import DiffusionConfig, DiffusionTransformer
from dparallel.models.lora import check_targets

FLOAT32 = torch.float32.itemsize
NF4_SCALES = 256  # scales that share a second-level scale
NF4_TABLES = FLOAT32 * (16 + 256 + 1)  # per matrix: its code, the scales' code, and their mean
ZERO3_LIVE = 1_000_000_000  # weights that ZeRO stage 3 keeps gathered by default
LOSS_COPIES = 4  # copies of a chunk of float32 logits during the entropy's backward pass


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one GPU.

    Attributes:
        weights: base and adapter; with ZeRO stage 3, their partition and the gathered weights.
        optimizer: the adapter in float32 and AdamW's two moments.
        gradients: the adapter's gradients and their accumulation.
        buffer: in which DeepSpeed collects gradients to add them up over all processes, of a fixed size
            (`reduce_bucket_size`), however small the adapter is.
        activations: stored activations, and working memory of the backward pass.
        update: float32 gradients during the optimizer step; activations are freed by then.
    """

    weights: int
    optimizer: int
    gradients: int
    buffer: int
    activations: int
    update: int

    @property
    def peak(self) -> int:
        held = self.weights + self.optimizer + self.gradients + self.buffer
        return held + max(self.activations, self.update)

    def kinds(self) -> dict[str, int]:
        """Bytes by kind, for messages and tables."""
        return {"gradient buffer" if kind == "buffer" else kind: held for kind, held in asdict(self).items()}


@dataclass(frozen=True)
class Pass:
    """Shapes of a forward and backward pass: B, L and N; `soft` if the teacher's logits are targets."""

    views: int
    length: int
    read: int
    soft: bool = False

    @property
    def tokens(self) -> int:
        return self.views * self.length


def training_memory(
    model: DiffusionTransformer, training: TrainingConfig, shapes: Pass, processes: int, dtype: torch.dtype
) -> TrainingMemory:
    """Memory on the GPU of each of `processes` during training.

    Args:
        model: may be an `empty_model`, without weights.
        shapes: shapes of a forward and backward pass.
        dtype: of weights and activations.

    Raises:
        AdapterError: a LoRA target does not match in every layer.
    """
    w, stage = dtype.itemsize, zero_stage(training.deepspeed)
    zero = training.deepspeed.get("zero_optimization", {})
    trainable = adapter_count(model, training.lora)
    part = -(-trainable // processes)
    weights = base_bytes(model, training.quantization, dtype) + w * trainable
    if stage == 3:
        gathered = min(weights, w * int(zero.get("stage3_max_live_parameters", ZERO3_LIVE)))
        weights = gathered + (0 if offloads_weights(training.deepspeed) else -(-weights // processes))
    offloaded = offloads_optimizer(training.deepspeed)
    return TrainingMemory(
        weights=weights,
        optimizer=0 if offloaded else 3 * FLOAT32 * part,
        gradients=w * (part if stage == 3 else trainable) + (0 if offloaded else w * part),
        buffer=w * int(zero.get("reduce_bucket_size", REDUCE_BUCKET_SIZE)),
        activations=activation_bytes(model, training, shapes, dtype),
        update=0 if offloaded else FLOAT32 * part,
    )


def weight_count(model: nn.Module) -> int:
    """Number of weights of a model."""
    return sum(weight.numel() for weight in model.parameters())


def adapter_count(model: DiffusionTransformer, lora: LoraSettings) -> int:
    """Number of trainable weights: r (in + out) per adapted matrix."""
    check_targets(model, lora.targets)
    adapted = _adapted(model, lora)
    pairs = (
        (module.in_features, module.out_features)
        for layer in model.layers
        for name, module in layer.named_modules()
        if name.rpartition(".")[2] in adapted and isinstance(module, nn.Linear)
    )
    return lora.rank * sum(inputs + outputs for inputs, outputs in pairs)


def base_bytes(model: DiffusionTransformer, quantization: str | None, dtype: torch.dtype) -> int:
    """Bytes of the frozen weights; quantization applies to the matrices of layers only."""
    total = dtype.itemsize * weight_count(model)
    if quantization is None:
        return total
    matrices = [
        module.weight.numel()
        for layer in model.layers
        for module in layer.modules()
        if isinstance(module, nn.Linear)
    ]
    return total - dtype.itemsize * sum(matrices) + sum(map(_nf4_bytes, matrices))


def _nf4_bytes(weights: int) -> int:
    scales = -(-weights // BLOCK)  # one byte each
    return -(-weights // 2) + scales + FLOAT32 * -(-scales // NF4_SCALES) + NF4_TABLES


def activation_bytes(
    model: DiffusionTransformer, training: TrainingConfig, shapes: Pass, dtype: torch.dtype
) -> int:
    """Peak between forward pass and optimizer step: stored activations and backward working memory."""
    config, w = model.config, dtype.itemsize
    logits = shapes.read * config.vocab_size
    loss = 2 * w * logits + LOSS_COPIES * min(FLOAT32 * logits, CHUNK_BYTES)  # gradient, correct positions
    layer = (
        w * shapes.tokens * (3 * config.intermediate_size + 4 * config.hidden_size)
    )  # gradients in a layer
    layer += 2 * FLOAT32 * shapes.tokens * config.hidden_size  # norms and rotary positions
    if training.gradient_checkpointing:
        layer += layer_bytes(model, training.lora, shapes.tokens, shapes.tokens, w)
    return kept_bytes(model, training, shapes, dtype) + max(loss, layer)


def kept_bytes(
    model: DiffusionTransformer, training: TrainingConfig, shapes: Pass, dtype: torch.dtype
) -> int:
    """Bytes of activations that the forward pass stores for the backward pass."""
    config, w, tokens = model.config, dtype.itemsize, shapes.tokens
    layers = config.num_hidden_layers
    head = shapes.read * (_norm_bytes(config) + (1 + shapes.soft) * w * config.vocab_size)
    if training.gradient_checkpointing:  # only the input of each layer
        return w * layers * tokens * config.hidden_size + head
    inner = layer_bytes(model, training.lora, tokens, tokens, w)
    last = layer_bytes(model, training.lora, tokens, shapes.read, w)
    first_norm = tokens * _norm_bytes(config)  # not stored: the embedding is frozen
    return (layers - 1) * inner + last - first_norm + head


def layer_bytes(model: DiffusionTransformer, lora: LoraSettings, tokens: int, queries: int, w: int) -> int:
    """Bytes stored by a layer, with keys and values for `tokens` and everything else for `queries`."""
    config, adapted = model.config, _adapted(model, lora)
    size, wide, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    q_size, kv_size = config.query_size, config.key_value_size
    # Inputs of adapted matrices are stored: (matrices that share an input, rows, width).
    inputs = [
        ({"k_proj", "v_proj"} if queries < tokens else {"q_proj", "k_proj", "v_proj"}, tokens, size),
        ({"q_proj"} if queries < tokens else set(), queries, size),
        ({"gate_proj", "up_proj"}, queries, size),
        ({"down_proj"}, queries, wide),
    ]
    total = sum(w * rows * width for matrices, rows, width in inputs if matrices & adapted)
    total += (tokens + queries) * _norm_bytes(config)
    # keys and values; queries and attention output
    total += w * (2 * tokens * kv_size + 2 * queries * q_size)
    if config.qk_norm:  # what is normalized, in float32, with a factor per head
        heads_in = queries * heads + tokens * config.num_key_value_heads
        total += FLOAT32 * heads_in * (config.head_size + 1)
    total += FLOAT32 * queries * heads  # the softmax's normalisers
    total += w * queries * 3 * wide  # gate, silu(gate), up
    total += sum(w * lora.rank * (tokens if name in ("k_proj", "v_proj") else queries) for name in adapted)
    if lora.dropout:  # per matrix: its input after dropout, and the dropout mask
        special = {"down_proj": wide, "o_proj": q_size}
        widths = {name: special.get(name, size) for name in adapted}
        total += sum((w + 1) * tokens * width for width in widths.values())
    return total


def _norm_bytes(config: DiffusionConfig) -> int:
    """Bytes per token stored by a norm: its input, and one float32 factor."""
    return FLOAT32 * (config.hidden_size + 1)


def _adapted(model: DiffusionTransformer, lora: LoraSettings) -> set[str]:
    """Names of the adapted matrices, without the prefix up to the last dot."""
    names = [name for name, module in model.layers[0].named_modules() if isinstance(module, nn.Linear)]
    targets = lora.targets
    return {
        name.rpartition(".")[2]
        for name in names
        if any(name == target or name.endswith("." + target) for target in targets)
    }
