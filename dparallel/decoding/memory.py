"""Estimate how many rows fit into memory before decoding starts."""

import psutil
import torch

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.cache import bytes_per_row
from dparallel.decoding.compiled import kept_bytes
from dparallel.models.backbone import DiffusionConfig, DiffusionTransformer
from dparallel.rules.rules import RULES

USABLE = 0.9  # fraction of the free memory; the allocator needs some slack


def rows_that_fit(model: DiffusionTransformer, length: int, decoding: DecodingConfig) -> int:
    """Number of rows of canvas `length` that can be decoded together in the free memory.

    Raises:
        MemoryError: a single row does not fit.
    """
    free = free_bytes(model.device) + kept_bytes(model)
    needed = row_bytes(model.config, length, decoding, model.dtype)
    rows = int(USABLE * free / needed)
    if rows < 1:
        raise MemoryError(
            f"one row of {length} tokens needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB "
            f"are free on {model.device}: lower gen_length={decoding.gen_length}, shorten the prompts, or "
            f"use cache='none' (now {decoding.cache!r}) or a smaller dtype (now {model.dtype})"
        )
    return rows


def row_bytes(config: DiffusionConfig, length: int, decoding: DecodingConfig, dtype: torch.dtype) -> int:
    """Bytes of a row at the peak of a forward pass: KV cache, widest layer and predictions."""
    size = max(config.hidden_size, config.query_size)
    layer = length * (4 * size + 3 * config.intermediate_size) * dtype.itemsize
    rotated = length * 8 * size * torch.float32.itemsize
    one_block = decoding.mode in ("sequential", "revising", "autoregressive")
    reads = decoding.block_length if one_block else decoding.gen_length
    per_logit = dtype.itemsize + 5 * torch.float32.itemsize
    if decoding.temperature > 0:
        per_logit += 24  # random numbers, hashed in int64
    if decoding.top_p is not None or decoding.top_k is not None:
        per_logit += 24  # sorted logits and their order
    predictions = reads * config.vocab_size * per_logit
    total = layer + rotated + predictions
    if decoding.cache != "none":
        total += bytes_per_row(config, length, dtype)
    if RULES[decoding.rule].needs_previous:
        total += 2 * decoding.gen_length * config.vocab_size * torch.float32.itemsize
    return total


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, including unused memory that torch holds."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available
