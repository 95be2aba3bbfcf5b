import math
import random
import statistics
from datetime import UTC, datetime

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dparallel.config.decoding import DecodingConfig
from dparallel.evaluation.measure import Measurement, add_up
from dparallel.evaluation.metrics import wilson
from dparallel.evaluation.store import SAMPLES
from dparallel.problems.scorer import FLAG, Measure
from dparallel.stages.manifest import StageError

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


def test_graded_and_pooled_metrics_by_hand() -> None:
    """Four problems; F1 0, 0.5, 1, 1: mean 0.625, squares 0.6875, s.e. sqrt(0.6875 / 3 / 4) = 0.239357."""
    samples = samples_of([(1, 1)] * 4, 1, [1], batch_size=4, hardware="A")
    measures = {
        "f1": Measure("share"),
        "rouge": Measure("share", full=100),
        "exact": FLAG,
        "length": Measure("number", full=None, lower_is_better=True),
        "bleu": Measure(
            "item", full=100, whole=lambda items: sum(a for a, _ in items) / sum(b for _, b in items)
        ),
    }
    verdicts = {
        "f1": [0.0, 0.5, 1.0, True],
        "rouge": [100.0, 0, 100.0, 0],
        "exact": [True, False, True, None],
        "length": [10, 20, 30, None],
        "bleu": [[100, 2], [50, 1], [0, 1], [50, 4]],
    }
    found = add_up(DECODING, samples, verdicts, measures=measures)
    assert (found.accuracy, found.problems) == (0.625, 4)
    assert found.accuracy_stderr == pytest.approx(0.239357, abs=1e-6)
    # t of 3 degrees of freedom at 97.5 %: 3.182446; 0.625 - 0.761742 < 0 and 0.625 + 0.761742 > 1
    assert found.accuracy_interval == (0.0, 1.0)
    assert found.metrics == {"f1": 0.625, "rouge": 0.5, "exact": 2 / 3, "bleu": 0.25}
    assert found.scores == {"length": 20.0}
    assert found.stderrs["length"] == pytest.approx(math.sqrt(200 / 2 / 3))
    assert (found.graded, found.pooled, found.lower_is_better) == (("f1",), ("bleu",), ("length",))
    assert found.intervals["rouge"] == wilson(2, 4), "all values are 0 or the best one"
    assert found.errors["exact"] == pytest.approx(math.sqrt(2 / 9 / 3))
    draws = random.Random(0)
    again = []
    for _ in range(100):  # as lm-eval's bootstrap draws
        chosen = draws.choices(verdicts["bleu"], k=4)
        again.append(sum(a for a, _ in chosen) / sum(b for _, b in chosen) / 100)
    assert found.stderrs["bleu"] == pytest.approx(statistics.stdev(again))
    assert found.resamples == (), "the accuracy is not pooled"
    assert [found.kind(metric) for metric in ("f1", "rouge", "length", "bleu")] == [
        "mean",
        "correct",
        "mean",
        "pooled",
    ]
    first = add_up(DECODING, samples, {"bleu": verdicts["bleu"]}, measures=measures)
    assert first.resamples == pytest.approx(again)
    low, _ = first.accuracy_interval
    assert low == pytest.approx(max(0.25 - 1.959964 * first.accuracy_stderr, 0))
    assert Measurement.model_validate(first.model_dump(mode="json")) == first


def test_a_narrow_interval_is_not_cut() -> None:
    """0.4, 0.5, 0.6: mean 0.5, s.e. 0.1 / sqrt(3), t of 2 degrees 4.302653: 0.5 -/+ 0.248414."""
    samples = samples_of([(1, 1)] * 3, 1, [1], batch_size=4, hardware="A")
    found = add_up(DECODING, samples, {"f1": [0.4, 0.5, 0.6]}, measures={"f1": Measure("share")})
    assert found.accuracy_interval == pytest.approx((0.251586, 0.748414), abs=1e-6)
    one = add_up(DECODING, samples[:1], {"f1": [0.4]}, measures={"f1": Measure("share")})
    assert (one.accuracy_stderr, one.accuracy_interval) == (0.0, (0.0, 1.0)), "one value says nothing"


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_values_of_0_and_1_are_measured_as_truth_values_are(flags: list[bool]) -> None:
    samples = samples_of([(1, 1)] * len(flags), 1, [1], batch_size=4, hardware="A")
    plain = add_up(DECODING, samples, {"right": flags})
    graded = add_up(
        DECODING, samples, {"right": list(map(float, flags))}, measures={"right": Measure("share")}
    )
    assert graded == plain


def test_an_accuracy_without_a_value_on_its_scale_is_an_error() -> None:
    samples = samples_of([(1, 1)] * 2, 1, [1], batch_size=4, hardware="A")
    outside = Measure("item", full=1.0, whole=sum)
    with pytest.raises(
        StageError, match="the metric 'f1', the accuracy, is 3 for these responses, not a sha"
    ):
        add_up(DECODING, samples, {"f1": [1, 2]}, measures={"f1": outside})
    nothing = Measure("item", full=1.0, whole=lambda items: 1 / 0)
    with pytest.raises(StageError, match="the accuracy, has no value for these responses"):
        add_up(DECODING, samples, {"f1": [1, 2]}, measures={"f1": nothing})
    found = add_up(DECODING, samples, {"exact": [True, False], "f1": [1, 2]}, measures={"f1": outside})
    assert (found.metrics, found.scores) == ({"exact": 0.5}, {"f1": 3.0})
