"""Trajectory shards on disk: `part-00000.parquet` and so on, each whole or not there."""

import os
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from dparallel.stages.manifest import CLAIM, MANIFEST, StageError, verify
from dparallel.trajectories.schema import ForeignShardError, ShardMetadata, check_schema, with_metadata


def shard_name(index: int) -> str:
    return f"part-{index:05d}.parquet"


def write_shard(path: Path, rows: list[dict], metadata: ShardMetadata) -> None:
    """Write `rows` under a partial name, then rename: a reader never sees half a shard.

    A shard that another process has written meanwhile stays as it is: its bytes may be in a manifest.
    """
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")  # process ids repeat between machines
    pq.write_table(pa.Table.from_pylist(rows, schema=with_metadata(metadata)), partial, compression="zstd")
    if path.is_file():
        partial.unlink()
    else:
        os.replace(partial, path)


def remove_partials(folder: Path) -> None:
    """Delete what killed runs left behind."""
    for partial in folder.glob(".part-*.partial"):
        partial.unlink(missing_ok=True)


def read_shard(path: Path) -> tuple[pa.Table, ShardMetadata]:
    """One shard's rows and metadata; `ForeignShardError` if it is damaged or something else."""
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ForeignShardError(f"{path} is not readable Parquet: {error}") from error
    return table, check_schema(table.schema, str(path))


def load(folder: str | Path) -> pa.Table:
    """All rows of a finished recording, after its bytes were checked against the manifest.

    Raises:
        StageError: the folder is missing, holds no shards, is unfinished, or a shard was altered.
        ForeignShardError: a Parquet file there is not a trajectory shard.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StageError(f"{folder}: no such trajectories folder (looked in {Path.cwd()})")
    if (folder / MANIFEST).is_file():
        names = sorted(verify(folder, "trajectories").files)
        return pa.concat_tables([read_shard(folder / name)[0] for name in names])
    if (folder / CLAIM).is_file():
        raise StageError(f"{folder} is unfinished (no {MANIFEST}): run the trajectories stage again")
    for path in sorted(folder.glob("*.parquet")):
        read_shard(path)
    raise StageError(f"{folder} holds no finished trajectories (no {MANIFEST}); record them first")
