import pyarrow as pa

from dparallel.config.decoding import DecodingConfig
from dparallel.evaluation.measure import add_up
from dparallel.evaluation.store import SAMPLES

DECODING = DecodingConfig(gen_length=12, block_length=6, threshold=1.5)


def samples_of(
    counts: list[tuple[int, int]], seconds: float, alone: list[float], batch_size: int, hardware: str
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
