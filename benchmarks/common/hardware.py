"""Costs of a forward pass (bytes, FLOPs) and limits of the hardware (memory bandwidth, matrix rate).

Legend: D hidden size, E width of all key/value heads, F feed-forward size, N layers, V vocabulary.
"""

import inspect
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from dparallel.models.backbone import DiffusionConfig, DiffusionTransformer
from dparallel.stages.hardware import cpu_name

Result = TypeVar("Result")
LIMIT_ROUNDS = 20


@dataclass(frozen=True)
class Forward:
    """Shapes of a forward pass.

    Attributes:
        rows, width: shape of the input; hidden states of all its tokens are computed.
        attended: keys that each query attends to, including cached ones.
        read: number of positions with logits, over all rows.
    """

    rows: int
    width: int
    attended: int
    read: int


def flops(forward: Forward, config: DiffusionConfig) -> int:
    """Floating-point operations of the matrix products, counting a multiply-add as two.

    The last layer computes keys and values for all tokens, and the rest only where logits are read.
    """
    size, kv_size = config.hidden_size, config.key_value_size
    key_value = 2 * 2 * size * kv_size
    rest = 2 * (_layer_weights(config) - 2 * size * kv_size) + 4 * forward.attended * config.query_size
    tokens, layers = forward.rows * forward.width, config.num_hidden_layers
    head = 2 * size * config.vocab_size
    return layers * tokens * key_value + ((layers - 1) * tokens + forward.read) * rest + forward.read * head


def traffic(forward: Forward, config: DiffusionConfig, itemsize: int) -> int:
    """Bytes that must be transferred: all weights once, keys and values attended to, logits."""
    weights = config.num_hidden_layers * _layer_weights(config) + config.hidden_size * config.vocab_size
    keys_and_values = config.num_hidden_layers * forward.rows * forward.attended * 2 * config.key_value_size
    return itemsize * (weights + keys_and_values + forward.read * config.vocab_size)


def weight_count(config: DiffusionConfig) -> int:
    """Number of weights of all matrices, including the embedding."""
    return config.num_hidden_layers * _layer_weights(config) + 2 * config.hidden_size * config.vocab_size


def _layer_weights(config: DiffusionConfig) -> int:
    """Weights of a layer's matrices: queries and output, keys and values, feed-forward."""
    size = config.hidden_size
    return size * (2 * config.query_size + 2 * config.key_value_size + 3 * config.intermediate_size)


@contextmanager
def recorded(model: DiffusionTransformer) -> Iterator[list[Forward]]:
    """Record the shapes of every call of `model` within the context."""
    forwards: list[Forward] = []
    signature = inspect.signature(model.forward)

    def record(_: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        forwards.append(_shapes(**signature.bind(*args, **kwargs).arguments))

    hook = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield forwards
    finally:
        hook.remove()


def _shapes(
    input_ids: torch.Tensor, logits_at: torch.Tensor | None = None, cache: Any = None, **_: Any
) -> Forward:
    rows, width = input_ids.shape
    if logits_at is None:
        read = rows * width
    else:
        read = int(logits_at.sum()) if logits_at.dtype == torch.bool else logits_at.numel()
    return Forward(rows, width, width if cache is None else cache.length, read)


@dataclass(frozen=True)
class Limits:
    """Measured limits of a device and dtype: bytes/s of a large copy, FLOP/s of a large matrix product."""

    bandwidth: float
    matrix_rate: float

    def memory_seconds(self, forward: Forward, config: DiffusionConfig, itemsize: int) -> float:
        """Seconds to transfer the bytes of a forward pass."""
        return traffic(forward, config, itemsize) / self.bandwidth

    def or_faster(self, other: "Limits") -> "Limits":
        """The higher of each limit."""
        return Limits(max(self.bandwidth, other.bandwidth), max(self.matrix_rate, other.matrix_rate))

    def compute_seconds(self, forward: Forward, config: DiffusionConfig) -> float:
        """Seconds to compute the FLOPs of a forward pass."""
        return flops(forward, config) / self.matrix_rate


@torch.inference_mode()
def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measure the limits: the fastest of several rounds."""
    nbytes, side = (2**30, 8192) if device.type == "cuda" else (2**27, 1024)
    source = torch.ones(nbytes // dtype.itemsize, device=device, dtype=dtype)
    target = torch.ones_like(source)
    matrix = torch.randn(
        side, side, device=device, dtype=dtype
    )  # constants would draw less power and run faster
    product = torch.empty_like(matrix)

    def fastest(run: Callable[[], Any]) -> float:
        return min(timed(run, device)[1] for _ in range(LIMIT_ROUNDS))

    return Limits(
        bandwidth=2 * nbytes / fastest(lambda: target.copy_(source)),
        matrix_rate=2 * side**3 / fastest(lambda: torch.mm(matrix, matrix, out=product)),
    )


def timed(run: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """Result of `run`, and wall seconds until the device has finished."""
    _wait(device)
    began = time.perf_counter()
    result = run()
    _wait(device)
    return result, time.perf_counter() - began


def activation_bytes(forward: Callable[[], torch.Tensor], model: torch.nn.Module) -> int:
    """Bytes held for the backward pass of `forward`, which returns a scalar.

    On a GPU: peak of forward and backward pass above the memory allocated before, including gradients. On a
    CPU, whose allocator has no statistics: bytes of the storages saved for the backward pass, without
    weights. With gradient checkpointing, the latter excludes what is recomputed.
    """
    device = next(model.parameters()).device
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        forward().backward()
        peak = torch.cuda.max_memory_allocated(device) - before
        model.zero_grad()
        return peak
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}  # references prevent reuse of addresses

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in saved.values())


def reset_peak_memory(device: torch.device) -> None:
    """Restart the peak of `peak_memory_bytes` at the current memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Linux: sets the process's peak to its current memory
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory: on a GPU, of this process's tensors; on a CPU, resident memory including libraries."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(device: torch.device) -> dict[str, str]:
    """Hardware, threads, versions and commit, to be reported with measurements."""
    return {
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit of this file, with `-dirty` if tracked files were changed."""
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, encoding="utf-8")
    return done.stdout.strip() or "unknown"
