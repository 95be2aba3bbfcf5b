from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dparallel.evaluation.store import SAMPLES, Keys, Store
from dparallel.stages.manifest import StageError


def slice_of(rows: range, nfe: int = 1) -> pa.Table:
    return pa.Table.from_pylist([{"row": row, "nfe": nfe, "text": "x" * 200} for row in rows], schema=SAMPLES)


def test_slices_in_any_order_are_one_table(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert len(store.samples("key")) == 0
    for rows in (range(4, 6), range(0, 4)):
        store.put_samples("key", rows, slice_of(rows))
    assert store.samples("key")["row"].to_pylist() == list(range(6))
    assert store.samples("key").schema == SAMPLES
    assert store.has_samples("key", range(3, 6))
    assert not store.has_samples("key", range(3, 7))
    assert not store.has_samples("other", range(1))


def test_samples_that_were_stored_without_their_date_are_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put_samples("key", range(2), slice_of(range(2)).drop_columns(["measured_at"]))
    store.put_samples("key", range(2, 4), slice_of(range(2, 4)))
    assert store.samples("key").schema == SAMPLES
    assert store.samples("key")["measured_at"].null_count == 4


def test_a_row_that_two_slices_hold_counts_once(tmp_path: Path) -> None:
    """As if two processes decode the same samples with different batch sizes."""
    store = Store(tmp_path)
    store.put_samples("key", range(0, 4), slice_of(range(4), nfe=1))
    store.put_samples("key", range(2, 6), slice_of(range(2, 6), nfe=2))
    assert store.samples("key")["nfe"].to_pylist() == [1, 1, 1, 1, 2, 2]


def test_what_is_there_is_kept_and_no_part_of_a_file_is_seen(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put_samples("key", range(2), slice_of(range(2), nfe=1))
    store.put_samples("key", range(2), slice_of(range(2), nfe=2))
    assert store.samples("key")["nfe"].to_pylist() == [1, 1]
    (folder,) = (tmp_path / "samples").iterdir()
    assert [file.name for file in folder.iterdir()] == ["00000-00002.parquet"]
    (folder / ".00002-00004.parquet.0.partial").write_bytes(b"half")
    assert len(store.samples("key")) == 2


def test_verdicts_survive_the_round_trip(tmp_path: Path) -> None:
    store, verdicts = Store(tmp_path), pa.table({"row": [0, 1, 2], "solution": [True, None, False]})
    assert store.verdicts("key") is None
    store.put_verdicts("key", range(2, 3), verdicts.slice(2))
    assert not store.has_verdicts("key", range(3))
    store.put_verdicts("key", range(0, 2), verdicts.slice(0, 2))
    assert store.has_verdicts("key", range(3))
    assert store.verdicts("key") == verdicts


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[60] ^= 1  # in a page of data, as the assertion in the test shows
    file.write_bytes(content)


def other_columns(file: Path) -> None:
    pq.write_table(pa.table({"row": [0, 1]}), file)


@pytest.mark.parametrize("spoil", [cut_short, empty, flip_a_bit, other_columns])
def test_a_damaged_file_is_named_with_the_remedy(tmp_path: Path, spoil) -> None:
    store = Store(tmp_path)
    store.put_samples("key", range(2), slice_of(range(2)))
    spoil(tmp_path / "samples" / "key" / "00000-00002.parquet")
    with pytest.raises(StageError, match=r"key/00000-00002.parquet .*: delete it to measure again"):
        store.samples("key")


def test_files_that_changed_since_are_named(tmp_path: Path) -> None:
    store, made = Store(tmp_path), tmp_path / "benchmark"
    store.put_samples("a", range(2), slice_of(range(2)))
    store.put_verdicts("b", range(1), pa.table({"row": [0], "solution": [True]}))
    digests = store.digests([Keys("a", ("b",)), Keys("a", ("b",))])
    assert list(digests) == ["samples/a/00000-00002.parquet", "verdicts/b/00000-00001.parquet"]
    store.check(digests, made)
    (tmp_path / "verdicts" / "b" / "00000-00001.parquet").write_bytes(b"other")
    with pytest.raises(
        StageError, match=r"verdicts/b/00000-00001.parquet was damaged or edited, and .*benchmark was made"
    ):
        store.check(digests, made)
    (tmp_path / "verdicts" / "b" / "00000-00001.parquet").unlink()
    with pytest.raises(StageError, match=r"verdicts/b/00000-00001.parquet is missing"):
        store.check(digests, made)
