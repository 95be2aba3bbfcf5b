"""Trajectory shards on disk: `part-00000.parquet` and so on, each either complete or absent."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dparallel.stages.files import is_there, write_table
from dparallel.stages.manifest import CLAIM, MANIFEST, StageError, verify
from dparallel.trajectories.schema import ForeignShardError, ShardMetadata, check_schema, with_metadata

log = logging.getLogger(__name__)


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"part-{index:05d}.parquet"


def write_shard(path: Path, rows: list[dict], metadata: ShardMetadata) -> None:
    """Write `rows` as a shard, atomically.

    A shard that another process has written meanwhile is kept, since a manifest may already list its hash.
    """
    schema = with_metadata(metadata, rows[0] if rows else ())
    write_table(path, pa.Table.from_pylist(rows, schema=schema), replace=False)


def read_shard(path: Path) -> tuple[pa.Table, ShardMetadata]:
    """Rows and metadata of a shard; ForeignShardError if it is damaged or not a shard."""
    if path.is_dir():  # it would be read as a data set of many files
        raise ForeignShardError(f"{path} is a folder, expected a file: delete it and run its stage again")
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise ForeignShardError(
            f"{path} is not readable Parquet ({error}): delete it and run its stage again"
        ) from error
    return table, check_schema(table.schema, str(path))


def same_recordings(path: Path, metadata: ShardMetadata) -> Iterator[tuple[Path, pa.Table]]:
    """Shards of the same number and recording as the shard `path` in other folders of its experiment.

    Each is read when it is asked for; damaged and foreign files are passed over. Their problems may differ.
    """
    for file in sorted(path.parents[1].glob(f"trajectories-*/{path.name}")):
        if file.parent.name == path.parent.name:
            continue
        try:
            if _recording(file) != metadata.recording:
                continue
            table, _ = read_shard(file)
        except (ForeignShardError, ValueError, OSError) as error:
            log.warning("%s is passed over: %s", file, error)
            continue
        yield file, table


def _recording(file: Path) -> str | None:
    try:
        return check_schema(pq.read_schema(file), str(file)).recording
    except pa.ArrowInvalid as error:
        raise ForeignShardError(f"{file} is not readable Parquet ({error})") from error


def load(folder: str | Path) -> pa.Table:
    """Load all rows of a finished recording after verifying the files against the manifest.

    Raises:
        StageError: the folder is missing, unfinished, contains no shards, or a shard was modified.
        ForeignShardError: a Parquet file is not a trajectory shard.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StageError(f"{folder}: no such trajectories folder (looked in {Path.cwd()})")
    if is_there(folder / MANIFEST):
        names = sorted(verify(folder, "trajectories").files)
        return pa.concat_tables([read_shard(folder / name)[0] for name in names])
    if is_there(folder / CLAIM):
        raise StageError(f"{folder} is unfinished (no {MANIFEST}): run the trajectories stage again")
    for path in sorted(folder.glob("*.parquet")):
        read_shard(path)
    raise StageError(f"{folder} holds no finished trajectories (no {MANIFEST}); record them first")
