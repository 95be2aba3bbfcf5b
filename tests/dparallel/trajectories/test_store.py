import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import TrajectoriesConfig
from dparallel.config.problems import ProblemsConfig
from dparallel.stages.manifest import Stage, StageError
from dparallel.trajectories import store
from dparallel.trajectories.schema import METADATA_KEY, SCHEMA, ForeignShardError, ShardMetadata

DECODING = DecodingConfig(gen_length=4, block_length=2)
METADATA = ShardMetadata(teacher="t", tokenizer="k", decoding=DECODING)
CONFIG = TrajectoriesConfig(problems=ProblemsConfig(benchmark="coins", count=2), decoding=DECODING)


def row(**changes) -> dict:
    return {
        "problem_id": "a",
        "source": "s",
        "prompt": "Tom 7",
        "prompt_ids": [14, 11],
        "response_ids": [5, 6, 2, 2],
        "commit_step": [0, 1, 0, 2],
        "confidence": [0.5, 0.25, 1.0, 0.0],
        "response": "x",
        "reference": None,
        "correct": None,
        "nfe": 3,
        "num_tokens": 3,
        "seed": None,
        **changes,
    }


rows = st.builds(
    row,
    prompt=st.text(),
    response=st.text(),
    reference=st.none() | st.text(),
    correct=st.none() | st.booleans(),
    prompt_ids=st.lists(st.integers(0, 2**31 - 1), max_size=5),
    response_ids=st.lists(st.integers(0, 2**31 - 1), min_size=4, max_size=4),
    commit_step=st.lists(st.integers(0, 2**15 - 1), min_size=4, max_size=4),
    confidence=st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4),
    nfe=st.integers(1, 2**31 - 1),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
)


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A finished recording of two shards, written without a model."""
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{}", encoding="utf-8")
    folder = tmp_path / "recorded"
    stage = Stage("trajectories", CONFIG, {"teacher": tmp_path / "teacher"}, folder)
    for index, name in enumerate("ab"):
        store.write_shard(folder / store.shard_name(index), [row(problem_id=name)], METADATA)
    stage.finish(files=[store.shard_name(0), store.shard_name(1)])
    return folder


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(written=st.lists(rows, max_size=4))
def test_rows_and_metadata_survive_the_round_trip(tmp_path: Path, written: list[dict]) -> None:
    path = tmp_path / store.shard_name(7)
    store.write_shard(path, written, METADATA)
    table, metadata = store.read_shard(path)
    assert table.to_pylist() == written
    assert metadata == METADATA
    assert [file.name for file in tmp_path.iterdir()] == ["part-00007.parquet"]
    path.unlink()  # a shard that is there stays


def test_two_writers_of_one_shard_leave_one_whole(tmp_path: Path) -> None:
    """Long rows, so that writers overlap; concurrent readers find no file or a complete shard."""
    path = tmp_path / store.shard_name(0)
    written = [row(problem_id=str(index), response="x" * 500) for index in range(2_000)]
    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(store.write_shard, path, written, METADATA) for _ in range(4)]
        while not all(writer.done() for writer in writers):
            if path.is_file():
                assert store.read_shard(path)[0].num_rows == len(written)
    for writer in writers:
        writer.result()
    assert store.read_shard(path)[0].to_pylist() == written
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_shard_that_is_there_already_stays(tmp_path: Path) -> None:
    path = tmp_path / store.shard_name(0)
    store.write_shard(path, [row(problem_id="first")], METADATA)
    store.write_shard(path, [row(problem_id="second")], METADATA)
    assert store.read_shard(path)[0]["problem_id"].to_pylist() == ["first"]


def test_shards_are_compressed_with_zstd_and_carry_the_contracts_types(recorded: Path) -> None:
    file = pq.ParquetFile(recorded / "part-00000.parquet")
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    types = {field.name: str(field.type).replace("element: ", "item: ") for field in file.schema_arrow}
    assert types["commit_step"] == "list<item: int16>"
    assert types["confidence"] == "list<item: float>"
    assert types["prompt_ids"] == types["response_ids"] == "list<item: int32>"
    assert (types["correct"], types["nfe"], types["seed"]) == ("bool", "int32", "int64")
    stored = json.loads(file.schema_arrow.metadata[METADATA_KEY])
    assert stored.keys() == {"schema_version", "teacher", "tokenizer", "decoding", "recording"}
    assert stored["decoding"]["gen_length"] == 4


def test_load_reads_all_shards_in_order(recorded: Path) -> None:
    assert store.load(recorded)["problem_id"].to_pylist() == ["a", "b"]


def test_a_damaged_shard_is_named(recorded: Path) -> None:
    shard = recorded / "part-00001.parquet"
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(StageError, match=r"part-00001\.parquet does not match manifest\.json"):
        store.load(recorded)


def test_a_missing_shard_is_named(recorded: Path) -> None:
    (recorded / "part-00000.parquet").unlink()
    with pytest.raises(StageError, match=r"part-00000\.parquet is missing"):
        store.load(recorded)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="nowhere: no such trajectories folder"):
        store.load(tmp_path / "nowhere")


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="holds no finished trajectories"):
        store.load(tmp_path)


def test_an_unfinished_folder_is_named(recorded: Path) -> None:
    (recorded / "manifest.json").unlink()
    with pytest.raises(StageError, match="is unfinished"):
        store.load(recorded)


def test_another_stages_folder_is_named(recorded: Path) -> None:
    manifest = json.loads((recorded / "manifest.json").read_text(encoding="utf-8"))
    (recorded / "manifest.json").write_text(json.dumps({**manifest, "stage": "training"}), encoding="utf-8")
    with pytest.raises(StageError, match="made by stage 'training', expected 'trajectories'"):
        store.load(recorded)


def test_foreign_parquet_names_the_columns(tmp_path: Path) -> None:
    columns = {field.name: pa.array([], field.type) for field in SCHEMA}
    del columns["nfe"]
    columns["steps"] = pa.array([], pa.int32())
    columns["commit_step"] = pa.array([], pa.int64())
    pq.write_table(pa.table(columns), tmp_path / "data.parquet")
    with pytest.raises(ForeignShardError) as raised:
        store.load(tmp_path)
    for part in (
        "data.parquet",
        "no column 'nfe'",
        "unknown column 'steps'",
        "column 'commit_step' is int64, expected list<item: int16>",
    ):
        assert part in str(raised.value)


def test_the_right_columns_without_metadata_are_foreign(tmp_path: Path) -> None:
    pq.write_table(SCHEMA.empty_table(), tmp_path / "data.parquet")
    with pytest.raises(ForeignShardError, match="not written by dparallel"):
        store.load(tmp_path)


def test_another_schema_version_is_named(tmp_path: Path) -> None:
    newer = json.dumps({"schema_version": 2, "layout": "unheard of"})
    table = SCHEMA.empty_table().replace_schema_metadata({METADATA_KEY: newer})
    pq.write_table(table, tmp_path / "data.parquet")
    with pytest.raises(ForeignShardError, match="schema version 2, this code reads 1"):
        store.load(tmp_path)


def test_what_is_not_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "data.parquet").write_text("not parquet", encoding="utf-8")
    with pytest.raises(
        ForeignShardError, match=r"data\.parquet is not readable Parquet .*: delete it and run its"
    ):
        store.load(tmp_path)
