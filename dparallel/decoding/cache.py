"""KV cache over all canvas positions, for decoding that recomputes only some of them.

For bidirectional models a cache is an approximation: an entry stems from the forward pass that last
recomputed its position.
Legend: b rows, S slots, L canvas length, W recomputed positions, H key/value heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dparallel.models.backbone import DiffusionConfig


def bytes_per_row(config: DiffusionConfig, length: int, dtype: torch.dtype) -> int:
    """Bytes of a row's keys and values."""
    width = config.key_value_size
    return 2 * config.num_hidden_layers * length * width * dtype.itemsize


class KeyValueStore:
    """Keys and values of `slots` canvases of `length` positions."""

    def __init__(
        self, config: DiffusionConfig, slots: int, length: int, device: torch.device, dtype: torch.dtype
    ):
        shape = (slots, length, config.num_key_value_heads, config.head_size)
        # One tensor per layer: compiled code would copy a common tensor at every partial write.
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]


@dataclass(frozen=True)
class CacheView:
    """A forward pass's view of the store, in which new entries replace those of the same positions.

    Attributes:
        slots: (b,) slot of each row.
        positions: (b, W) recomputed positions; None if the forward pass covers the whole canvas.
        length: canvas positions attended to.
        all_slots: whether `slots` are the first b slots in order, so that no copy is needed.
    """

    store: KeyValueStore
    slots: Tensor
    positions: Tensor | None
    length: int
    all_slots: bool

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store `key` and `value` (b, H, W, head_size); return those of the canvas, (b, H, L, head_size)."""
        keys, values = self.store.keys[layer], self.store.values[layer]  # (S, L, H, head_size)
        if self.positions is None:
            keys[self.slots, : self.length] = key.transpose(1, 2)
            values[self.slots, : self.length] = value.transpose(1, 2)
            return key, value
        where = self.slots[:, None], self.positions
        keys[where] = key.transpose(1, 2)
        values[where] = value.transpose(1, 2)
        return self._read(keys), self._read(values)

    def _read(self, stored: Tensor) -> Tensor:
        rows = stored[: len(self.slots)] if self.all_slots else stored.index_select(0, self.slots)
        return rows[:, : self.length].transpose(1, 2)
