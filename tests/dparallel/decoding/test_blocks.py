"""The schedule of blocks, and which positions must be committed, against numbers worked by hand."""

import numpy as np

from dparallel.decoding.blocks import (
    best,
    best_of_each,
    first_full,
    live,
    open_next,
    overdue,
    places,
    stalled,
)


def flags(*rows: list[int]) -> np.ndarray:
    return np.array(rows, dtype=bool)


def test_best_is_the_first_of_the_highest_among_the_candidates():
    score = np.array([[1.0, 5.0, 3.0, 3.0], [1.0, 2.0, 3.0, 4.0], [np.nan, 2.0, np.nan, 1.0]])
    among = flags([1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1])
    assert best(score, among).astype(int).tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]


def test_the_best_of_each_block():
    score = np.array([[1.0, 5.0, 3.0, 3.0, 9.0, 9.0]])
    block, among = np.array([[0, 0, 2, 2, 3, 3]]), flags([1, 1, 1, 1, 0, 0])
    assert best_of_each(score, among, block).astype(int).tolist() == [[0, 1, 1, 0, 0, 0]]


def test_blocks_that_must_advance():
    """Row 0 commits nothing in its first incomplete block, row 1 does. Block 1 of row 0 advances."""
    block, masked = np.array([[0, 0, 1, 1], [0, 0, 1, 1]]), flags([1, 1, 1, 1], [1, 0, 1, 1])
    commit = flags([0, 0, 1, 0], [1, 0, 0, 0])
    assert overdue(block, masked, commit).astype(int).tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    both = flags([1, 1], [1, 1])
    assert stalled(both, block, masked, commit).astype(int).tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    assert not stalled(~both, block, masked, commit).any()


def test_blocks_open_by_their_committed_tokens():
    committed, opened = np.array([[3, 0, 0], [3, 0, 0], [2, 0, 0], [4, 4, 4]]), np.array([1, 1, 1, 3])
    may = np.array([True, False, True, True])
    assert open_next(committed, opened, 3, may).tolist() == [True, False, False, False]


def test_blocks_that_are_computed_again():
    """With four tokens a block: complete and settled, complete and not settled, incomplete, not open."""
    committed, rounds = np.array([[4, 4, 1, 0]]), np.array([[0, 1, 0, 0]])
    assert live(committed, 4, np.array([3]), rounds).astype(int).tolist() == [[0, 1, 1, 0]]
    assert first_full(np.array([[4, 3, 4]]), 4).astype(int).tolist() == [[1, 0, 0]]


def test_places_of_what_is_chosen():
    assert places(flags([0, 1, 0, 1], [0, 0, 0, 1]), 2).tolist() == [[1, 3], [3, 0]]
