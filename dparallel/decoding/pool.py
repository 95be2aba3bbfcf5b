"""A batch that requests join and leave while it is decoded, as in a server.

`generate` knows all its prompts at the start and gives each a row of its canvas. The canvas of a pool has a
row per slot, which is written anew for each request, and grows with the number of requests and their lengths.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.canvas import Canvas, rounded_up
from dparallel.decoding.denoise import Workspace
from dparallel.decoding.infill import gap_blocks, start_gaps
from dparallel.decoding.loop import Batch, Forward
from dparallel.decoding.revision import final_count
from dparallel.models.backbone import DiffusionTransformer


@dataclass(frozen=True)
class Look:
    """State of some rows after a forward pass, on the host: b rows, G `gen_length`.

    Attributes:
        tokens: (b, G) token ids of the response; masked positions hold the mask token.
        commit_step: (b, G) as in `Generation`; -1 while masked.
        confidence: (b, G) probability of each token when it was committed.
        nfe: (b,) forward passes.
        committed: (b,) number of tokens at the front of the response that are final.
    """

    tokens: np.ndarray
    commit_step: np.ndarray
    confidence: np.ndarray
    nfe: np.ndarray
    committed: np.ndarray


class Pool:
    """Rows of one model and decoding. All calls come from one thread, within `torch.inference_mode`.

    The tokens of a row equal those of `generate` with its prompt, decoding and seed alone.
    """

    def __init__(self, model: DiffusionTransformer, decoding: DecodingConfig, gaps: bool = False):
        """
        Args:
            decoding: of all rows, except its `seed`; not compiled, since compiled steps need fixed sizes.
            gaps: whether the rows are infills; `decoding` is then as `infill.fitted` returns it.
        """
        assert not decoding.compile
        self.model, self.decoding, self.gaps = model, decoding, gaps
        canvas = self._start([model.config.eos_token_id, model.config.mask_token_id] if gaps else [], 0)
        workspace = Workspace.allocate(model, decoding, 1, canvas.tokens.shape[1])
        self.batch = Batch(model, canvas, workspace, decoding, 1)
        self._free = [0]

    def __len__(self) -> int:
        return len(self.batch)

    def join(self, prompt: Sequence[int], seed: int) -> int:
        """Add a row, which takes part from the next forward pass on; returns its slot.

        Args:
            prompt: token ids that `check_prompts` accepts, or `check_infill`.
            seed: of sampling, from `generate.row_seed`.
        """
        batch = self.batch
        length = len(prompt) + batch.canvas.room
        if not self._free or length > batch.canvas.tokens.shape[1]:
            self._grow(batch.size if self._free else 2 * batch.size, length)
        slot = self._free.pop(0)
        batch.canvas.put(slot, self._start(prompt, seed))
        batch.join(np.array([slot]), np.array([slot]))
        return slot

    def leave(self, slots: Sequence[int]) -> None:
        """Remove rows, finished or not; their slots are taken by the next ones."""
        free = self.batch.leave(np.isin(self.batch.slots, slots))
        self._free = sorted([*self._free, *free.tolist()])

    def forward(self) -> tuple[Forward, np.ndarray]:
        """One forward pass of rows that can be computed together.

        Returns:
            What it did, with the slots as rows, and which of these rows are finished.
        """
        forward = self.batch.forward()
        return forward, self.batch.canvas.done[forward.rows]

    def look(self, slots: np.ndarray) -> Look:
        """State of the rows at `slots` (b,)."""
        canvas = self.batch.canvas
        steps = canvas.commit_step[slots]
        committed = final_count(steps, canvas.rounds_left[slots], self.decoding.revises)
        return Look(canvas.responses(slots), steps, canvas.confidence[slots], canvas.nfe[slots], committed)

    def _start(self, prompt: Sequence[int], seed: int) -> Canvas:
        """The state of one row before its first forward pass."""
        config = self.model.config
        if not self.gaps:
            return Canvas.start([prompt], [seed], self.decoding, config)
        layout = gap_blocks(prompt, config.mask_token_id, self.decoding)
        return start_gaps([prompt], [layout], [seed], self.decoding, config)

    def _grow(self, slots: int, length: int) -> None:
        """Make room for `slots` rows and canvases of `length` positions; keeps the state of all rows."""
        batch, canvas, workspace = self.batch, self.batch.canvas, self.batch.workspace
        length = max(rounded_up(length), canvas.tokens.shape[1])
        canvas.grow(slots, length)
        if workspace.store is not None:
            for layers in (workspace.store.keys, workspace.store.values):
                for layer, kept in enumerate(layers):  # one after another: memory peaks a layer higher
                    layers[layer] = _enlarged(kept, (slots, length, *kept.shape[2:]))
        previous, sureness = (
            kept if kept is None else _enlarged(kept, (slots, *kept.shape[1:]))
            for kept in (workspace.previous, workspace.sureness)
        )
        batch.workspace = replace(workspace, previous=previous, sureness=sureness)
        self._free += range(batch.size, slots)
        batch.size = slots


def _enlarged(values: Tensor, shape: Sequence[int]) -> Tensor:
    """A copy of `values` at the front of a tensor of zeros of a larger `shape`; itself if it has it."""
    if tuple(values.shape) == tuple(shape):
        return values
    larger = values.new_zeros(tuple(shape))
    larger[tuple(slice(size) for size in values.shape)] = values
    return larger
