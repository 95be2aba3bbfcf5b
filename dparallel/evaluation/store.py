"""Samples and verdicts of all experiments of a `runs` folder, in files named by a digest of their origin.

    samples/<key>/00000-00250.parquet   a slice of responses, with the columns `SAMPLES`
    verdicts/<key>/00000-00250.parquet  verdicts of one scorer on a slice of the samples of a key
    certainty/<key>.json                certainty of a model while it decodes a prompt
    data/<key>.json                     files of problems, and what they held when they were first measured

Files appear atomically. Existing samples and verdicts are never replaced, so any number of processes may
write to a store.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from dparallel.stages.files import is_there, write_atomically, write_table
from dparallel.stages.manifest import StageError, digest, file_digest

SAMPLES = pa.schema(
    [
        ("row", pa.int32()),  # index of the prompt in its split
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("commit_step", pa.list_(pa.int16())),
        ("confidence", pa.list_(pa.float32())),
        ("nfe", pa.int32()),
        ("num_tokens", pa.int32()),
        ("seconds", pa.float64()),  # wall time of decoding the slice, divided equally among its rows
        ("seconds_alone", pa.float64()),  # wall time with batch size 1; null if not measured
        ("batch_size", pa.int32()),
        ("hardware", pa.string()),
        ("measured_at", pa.timestamp("ms", "UTC")),  # end of decoding the slice; null in older stores
    ]
)


@dataclass(frozen=True)
class Keys:
    """Keys of the samples and verdicts of a measurement.

    Attributes:
        repeats: keys of the samples of further responses to the same problems, judged together with these.
    """

    samples: str
    verdicts: tuple[str, ...]
    repeats: tuple[str, ...] = ()


class Elsewhere(Protocol):
    """Where other machines keep samples and verdicts, if they share no folder with this one."""

    def bring(self, path: Path) -> None:
        """Bring a file, or the files of a folder, when it is first looked at."""

    def share(self, file: Path) -> None:
        """Keep a file that was made here there, too; if there is one already, take that one instead."""


class Store:
    """Reads and writes samples and verdicts; damaged files raise a StageError with the remedy.

    Args:
        elsewhere: where other machines keep them; by default `folder` holds all.
    """

    def __init__(self, folder: str | Path, elsewhere: Elsewhere | None = None):
        self.folder = Path(folder)
        self.elsewhere = elsewhere

    def put_samples(self, key: str, rows: range, samples: pa.Table) -> None:
        """Store the samples of these rows."""
        self._put(self.samples_file(key, rows), samples)

    def samples(self, key: str) -> pa.Table:
        """The stored samples of a key, in the order of their rows."""
        tables = [_read(file, SAMPLES) for file in _slices(self.samples_folder(key))]
        return _joined([SAMPLES.empty_table(), *tables])

    def has_samples(self, key: str, rows: range) -> bool:
        """Whether samples of all these rows are stored, judging by file names."""
        return _cover(self.samples_folder(key), rows)

    def put_verdicts(self, key: str, rows: range, verdicts: pa.Table) -> None:
        """Store the verdicts on the samples of these rows, with their numbers in the column `row`."""
        self._put(_slice(self.verdicts_folder(key), rows), verdicts)

    def verdicts(self, key: str) -> pa.Table | None:
        """The stored verdicts of a key, in the order of their rows; None if there are none."""
        tables = [_read(file) for file in _slices(self.verdicts_folder(key))]
        return _joined(tables) if tables else None

    def has_verdicts(self, key: str, rows: range) -> bool:
        """Whether verdicts on all these rows are stored, judging by file names."""
        return _cover(self.verdicts_folder(key), rows)

    def put_certainty(self, key: str, text: str) -> None:
        """Store a certainty map as JSON text."""
        file = self.certainty(key)
        write_atomically(file, text, replace=False)
        self._share(file)

    def certainty(self, key: str) -> Path:
        """Path of a certainty map."""
        return self._brought(self.folder / "certainty" / f"{key}.json")

    def digests(self, keys: Iterable[Keys]) -> dict[str, str]:
        """SHA-256 of every file of these keys, by path relative to the store."""
        files = set[Path]()
        for key in keys:
            folders = [self.samples_folder(samples) for samples in (key.samples, *key.repeats)]
            for folder in [*folders, *map(self.verdicts_folder, key.verdicts)]:
                files |= set(_slices(folder))
        return {file.relative_to(self.folder).as_posix(): file_digest(file) for file in sorted(files)}

    def check(self, digests: Mapping[str, str], made: Path) -> None:
        """Raise a StageError for the first missing or changed file of those that `made` was made from."""
        for name, expected in digests.items():
            file = self.folder / name
            self._brought(file.parent)
            if not is_there(file) or file_digest(file) != expected:
                state = "was damaged or edited" if is_there(file) else "is missing"
                raise StageError(
                    f"{file} {state}, and {made} was made from it: delete {file} and {made}, and run the "
                    "stage again; only what is missing is measured again"
                )

    def check_unchanged(self, files: Sequence[Path]) -> None:
        """Raise a StageError if files of problems hold something else than when they were measured.

        Otherwise numbers of different problems would stand beside each other under one name.
        """
        record, held = self._data(files)
        try:
            before = json.loads(record.read_bytes())
        except (OSError, ValueError):  # none yet, or damaged
            return
        changed = [path for path in held if before.get(path) != held[path]]
        if changed:
            when = datetime.fromtimestamp(record.stat().st_mtime, UTC).date().isoformat()
            raise StageError(
                f"{', '.join(changed[:3])}: changed since its problems were measured ({when}, kept in "
                f"{self.folder}): restore the file, give the new one another name, use another folder of "
                f"runs, or delete {record} to measure the problems that it holds now"
            )

    def remember(self, files: Sequence[Path]) -> None:
        """Note what files of problems hold, for `check_unchanged`."""
        record, held = self._data(files)
        if held and not is_there(record):
            write_atomically(record, json.dumps(held, indent=1))

    def _data(self, files: Sequence[Path]) -> tuple[Path, dict[str, str]]:
        """Where the content of files is noted, and what they hold now: digests by path."""
        held = {str(file.absolute()): file_digest(file) for file in files}
        return self.folder / "data" / f"{digest(list(held))[:16]}.json", held

    def samples_file(self, key: str, rows: range) -> Path:
        """Path of a slice of the samples of a key."""
        return _slice(self.samples_folder(key), rows)

    def samples_folder(self, key: str) -> Path:
        """Folder of the samples of a key."""
        return self._brought(self.folder / "samples" / key)

    def verdicts_folder(self, key: str) -> Path:
        """Folder of the verdicts of a key."""
        return self._brought(self.folder / "verdicts" / key)

    def _put(self, file: Path, table: pa.Table) -> None:
        write_table(file, table, replace=False)
        self._share(file)

    def _share(self, file: Path) -> None:
        if self.elsewhere is not None:
            self.elsewhere.share(file)

    def _brought(self, path: Path) -> Path:
        if self.elsewhere is not None:
            self.elsewhere.bring(path)
        return path


def _slice(folder: Path, rows: range) -> Path:
    return folder / f"{rows.start:05d}-{rows.stop:05d}.parquet"


def _slices(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.parquet") if re.fullmatch(r"\d{5,}-\d{5,}", file.stem))


def _cover(folder: Path, rows: range) -> bool:
    """Whether the slices in a folder hold all these rows."""
    return _stored_rows(folder).issuperset(rows)


def _stored_rows(folder: Path) -> set[int]:
    slices = [tuple(map(int, file.stem.split("-"))) for file in _slices(folder)]
    return {row for start, stop in slices for row in range(start, stop)}


def _joined(slices: Sequence[pa.Table]) -> pa.Table:
    """One table in the order of the column `row`; of equal rows, the first one is taken.

    A metric may be true or false for all responses of a slice, and a number for those of another.
    """
    numbers = {field.name for table in slices for field in table.schema if pa.types.is_floating(field.type)}
    table = pa.concat_tables([_with_numbers(table, numbers) for table in slices])
    first = {row: place for place, row in reversed(list(enumerate(table["row"].to_pylist())))}
    return table.take(pa.array([first[row] for row in sorted(first)], pa.int64()))


def _with_numbers(table: pa.Table, names: set[str]) -> pa.Table:
    """The table with truth values in the columns `names` as 1.0 and 0.0."""
    for place, field in enumerate(table.schema):
        if field.name in names and pa.types.is_boolean(field.type):
            table = table.set_column(place, field.name, table[field.name].cast(pa.float64()))
    return table


def _read(file: Path, schema: pa.Schema | None = None) -> pa.Table:
    try:
        table = pq.ParquetFile(file, page_checksum_verification=True).read()
    except (pa.ArrowInvalid, OSError) as error:
        raise StageError(f"{file} is damaged: delete it to measure again ({error})") from error
    if schema is not None and "measured_at" not in table.column_names:
        table = table.append_column(
            schema.field("measured_at"), pa.nulls(len(table), pa.timestamp("ms", "UTC"))
        )
    if schema is not None and table.schema != schema:
        raise StageError(f"{file} has other columns than samples have: delete it to measure again")
    return table
