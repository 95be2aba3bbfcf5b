from datetime import UTC, datetime

import pyarrow as pa
import pytest

from dparallel.config.decoding import DecodingConfig
from dparallel.evaluation.measure import add_up
from dparallel.evaluation.store import SAMPLES

DECODING = DecodingConfig(gen_length=12, block_length=6, threshold=1.5)


def samples_of(
    counts: list[tuple[int, int]],
    seconds: float,
    alone: list[float],
    batch_size: int,
    hardware: str,
    day: int | None = None,
):
    """A slice of samples, given by (nfe, num_tokens), decoded in the given number of seconds."""
    rows = [
        {
            "nfe": nfe,
            "num_tokens": tokens,
            "seconds": seconds / len(counts),
            "seconds_alone": alone[place] if place < len(alone) else None,
            "batch_size": batch_size,
            "hardware": hardware,
            "measured_at": None if day is None else datetime(2026, 11, day, 23, 59, tzinfo=UTC),
        }
        for place, (nfe, tokens) in enumerate(counts)
    ]
    return pa.Table.from_pylist(rows, schema=SAMPLES)


def test_slices_add_up_by_hand() -> None:
    """Slices of different sizes, so that the mean over slices would be wrong."""
    big = samples_of([(2, 10), (4, 10), (6, 12)], 3, [1, 2, 3], batch_size=4, hardware="B")
    small = samples_of([(12, 8)], 1, [4], batch_size=2, hardware="A")
    verdicts: dict[str, list[bool | None]] = {
        "solution": [True, True, False, False],
        "answer": [True, None, None, False],
        "unknown": [None] * 4,
    }
    found = add_up(DECODING, pa.concat_tables([big, small]), verdicts)
    assert (found.samples, found.accuracy, found.accuracy_stderr) == (4, 0.5, 0.25)
    assert found.metrics == {"solution": 0.5, "answer": 0.5}
    assert (found.nfe, found.tpf, found.tps) == (24 / 4, 40 / 24, 40 / 4)
    assert found.latency == 10 / 4
    assert found.hardware == "A + B", "times of two kinds of machine say so"
    assert found.batch_sizes == (2, 4)
    assert add_up(DECODING, small, {"solution": [True]}).hardware == "A"


def test_the_interval_of_few_problems_by_hand() -> None:
    """With z² = 3.841459: none of 8 gives 0 to z² / (8 + z²), all of 4 give 4 / (4 + z²) to 1."""
    slices = samples_of([(1, 1)] * 8, 1, [1], batch_size=8, hardware="A")
    flags: list[bool | None] = [False] * 8
    found = add_up(DECODING, slices, {"first": flags, "second": [True] * 4 + [None] * 4})
    assert (found.accuracy, found.accuracy_stderr, found.problems) == (0, 0, 8)
    assert found.accuracy_interval == (0, pytest.approx(0.324408, abs=1e-6))
    assert found.intervals["second"] == (pytest.approx(0.510109, abs=1e-6), 1)
    assert found.judged == {"first": 8, "second": 4}


def test_days_and_what_was_reused() -> None:
    early, late, unknown = (
        samples_of([(1, 1)] * 2, 1, [1], batch_size=2, hardware="A", day=day) for day in (24, 26, None)
    )
    middle = samples_of([(1, 1)] * 2, 1, [1], batch_size=2, hardware="A", day=25)
    whole = pa.concat_tables([late, early, middle])
    found = add_up(DECODING, whole, {"exact": [True] * 6}, stored=2)
    assert (found.measured_on, found.reused) == (("2026-11-24", "2026-11-26"), 2)
    assert add_up(DECODING, early, {"exact": [True] * 2}).measured_on == ("2026-11-24",)
    assert add_up(DECODING, unknown, {"exact": [True] * 2}).measured_on == ()
