"""End rows at stop texts: when a stop text and everything before it is final, the row is done."""

from collections.abc import Callable, Collection, Sequence

import numpy as np

from dparallel.decoding.canvas import Canvas
from dparallel.decoding.revision import final_count

# Maps the first tokens of a response, without end tokens, to the number of tokens after which the response
# ends; None if it goes on. If it is n for some tokens, it is n for all longer responses that start with them.
Stop = Callable[[Sequence[int]], int | None]


class StopWatch:
    """Applies a `Stop` to the rows of a canvas after each forward pass."""

    def __init__(self, canvas: Canvas, stop: Stop, end_token_ids: Collection[int], revises: bool = False):
        self.canvas = canvas
        self.revises = revises  # whether committed tokens may change
        self.stop = stop
        self.end_token_ids = end_token_ids
        self.fill = next(iter(end_token_ids), 0)
        self.seen = np.zeros(len(canvas.nfe), dtype=int)  # final tokens that the last look has covered

    def end(self, rows: np.ndarray) -> None:
        """End those of the canvas rows `rows` (b,) that have reached a stop.

        Masked positions are filled with an end token, as after an end-of-sequence token.
        """
        canvas = self.canvas
        tokens = canvas.responses(rows)
        counts = final_count(canvas.commit_step[rows], canvas.rounds_left[rows], self.revises)
        for place, (row, count) in enumerate(zip(rows, counts, strict=True)):
            if count == self.seen[row]:
                continue
            self.seen[row] = count
            length = self.stop(before_end(tokens[place, :count].tolist(), self.end_token_ids))
            if length is not None:
                canvas.response_length[row] = length
                canvas.done[row] = True
                self._fill(row)

    def _fill(self, row: int) -> None:
        canvas = self.canvas
        masked = canvas.commit_step[row] < 0
        canvas.tokens[row, canvas.positions(np.array([row]), masked.nonzero()[0])] = self.fill
        canvas.commit_step[row, masked] = canvas.nfe[row] - 1


def before_end(tokens: Sequence[int], end_token_ids: Collection[int]) -> Sequence[int]:
    """The tokens before the first end token; all tokens if there is none."""
    return tokens[: next((place for place, token in enumerate(tokens) if token in end_token_ids), None)]
