"""Read rows of JSON and Parquet files, without conversion of texts, keeping only the requested columns."""

import gzip
import json
import re
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from dparallel.config.base import UserError
from dparallel.config.sources import PROBLEM_FILES, kind_of

KINDS = {kind: "Parquet" if kind == ".parquet" else "JSON" for kind in PROBLEM_FILES}
Record = dict[str, Any]  # values by column
COMMIT = re.compile(r"[0-9a-f]{40}")


class TableError(UserError):
    """A file cannot be read as rows; the message names the file, the row and the remedy."""


class HubError(TableError):
    """A data set on the Hub cannot be read, often because there is no network."""


class Table(Protocol):
    """Rows of named columns."""

    def __len__(self) -> int: ...

    def read(self, rows: Sequence[int], wanted: Sequence[str]) -> tuple[list[Record], list[str]]:
        """Read columns of some rows; returns the records (None for missing values) and all column names.

        Args:
            rows: row numbers from 0, ascending.
            wanted: columns to read.
        """
        ...


def open_table(file: Path) -> Table:
    """Open a JSON Lines or JSON file, also with gzip, or a Parquet file, recognized by its name's suffix."""
    return ParquetTable(file) if file.suffix == ".parquet" else JsonTable(file)


def check_kinds(files: Sequence[Path]) -> None:
    """Raise a TableError for unsupported files, and for files of several kinds."""
    kinds: dict[str, list[Path]] = {}
    for file in files:
        kind = KINDS.get(kind_of(file), "other")
        kinds.setdefault(kind, []).append(file)
    if len(kinds) > 1 or "other" in kinds:
        held = "; ".join(f"{kind}: {listed(found)}" for kind, found in kinds.items())
        raise TableError(
            f"give files of one kind, named {', '.join(PROBLEM_FILES)}, by a pattern such as FOLDER/*.jsonl; "
            f"found {held}"
        )


def listed(files: Sequence[Path]) -> str:
    """File names for messages; long lists are shortened."""
    shown = ", ".join(file.name for file in files[:10])
    return f"{shown} and {len(files) - 10} more" if len(files) > 10 else shown or "no file"


class Concatenation:
    """Several tables as one table."""

    def __init__(self, tables: Sequence[Table]):
        self.tables = tables

    def __len__(self) -> int:
        return sum(map(len, self.tables))

    def read(self, rows: Sequence[int], wanted: Sequence[str]) -> tuple[list[Record], list[str]]:
        records: list[Record] = []
        names: dict[str, None] = {}
        for table, portion in zip(self.tables, portions(rows, list(map(len, self.tables))), strict=True):
            if portion:
                found, columns = table.read(portion, wanted)
                records += found
                names |= dict.fromkeys(columns)
        return records, list(names)


def portions(rows: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Split ascending row numbers by parts of these lengths, renumbered from the start of each part."""
    place = start = 0
    for length in lengths:
        portion = []
        while place < len(rows) and rows[place] < start + length:
            portion.append(rows[place] - start)
            place += 1
        yield portion
        start += length


class JsonTable:
    """A JSON file: an object per line, a list of objects, or an object of columns (lists of equal length).

    A single object of texts and numbers is a row, also in several lines. An object whose only value is a list
    of objects, such as `{"data": [...]}`, is read as that list. For JSON Lines, only the offsets of lines are
    kept in memory, and requested rows are read from the file.
    Files whose names end in `.gz` are decompressed as they are read.
    """

    def __init__(self, file: Path):
        self.file = file
        self.places = array("q")
        self.document: list[Any] | None = None
        with self._explained():
            self._index()

    def __len__(self) -> int:
        return len(self.places) if self.document is None else len(self.document)

    def read(self, rows: Sequence[int], wanted: Sequence[str]) -> tuple[list[Record], list[str]]:
        names: dict[str, None] = {}
        records = []
        for record in self._records(rows):
            names |= dict.fromkeys(record)
            records.append({name: record.get(name) for name in wanted})
        return records, list(names)

    def _records(self, rows: Sequence[int]) -> Iterator[Record]:
        if self.document is not None:
            for row in rows:
                yield self._object(row, self.document[row])
            return
        with self._explained(), self._open() as lines:
            for row in rows:
                lines.seek(self.places[row])
                yield self._object(row, self._parse(row, lines.readline().rstrip()))

    def _open(self) -> gzip.GzipFile | BufferedReader:
        return gzip.GzipFile(self.file) if self.file.suffix == ".gz" else self.file.open("rb")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn errors of reading into TableErrors."""
        try:
            yield
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise TableError(f"{self.file}: damaged or no gzip file ({error}): copy it again") from error
        except OSError as error:
            raise TableError(
                f"{self.file} cannot be read ({error.strerror}): check its permissions"
            ) from error

    def _index(self) -> None:
        place = 0
        with self._open() as lines:
            for line in lines:
                content = line.removeprefix(b"\xef\xbb\xbf") if place == 0 else line
                if content.strip():
                    if not self.places and self._is_document(content):
                        self.document = self._read_document()
                        return
                    self.places.append(place + len(line) - len(content))
                place += len(line)
        if len(self.places) == 1 and self._is_columns():
            self.document = self._read_document()

    def _is_columns(self) -> bool:
        """Whether the only line is no row: a row holds a text, columns are lists (or objects, in pandas)."""
        record = next(self._records([0]))
        return bool(record) and all(isinstance(value, list | dict) for value in record.values())

    def _is_document(self, first_line: bytes) -> bool:
        """Whether the first line starts a JSON document that spans the whole file."""
        line = first_line.strip()
        return line[:1] == b"[" or line[-1:] in (b"{", b"[", b",")

    def _read_document(self) -> list[Any]:
        with self._open() as whole:
            content = self._parse(None, whole.read().removeprefix(b"\xef\xbb\xbf"))
        if isinstance(content, list):
            return content
        columns = content if isinstance(content, dict) else {}
        if columns and not any(isinstance(value, list | dict) for value in columns.values()):
            return [content]  # a row in several lines
        lists = [column for column in columns.values() if isinstance(column, list)]
        if len(columns) == len(lists) == 1 and all(isinstance(row, dict) for row in lists[0]):
            return lists[0]
        if not lists or len(lists) < len(columns) or len(set(map(len, lists))) > 1:
            raise TableError(
                f"{self.file}: holds one {type(content).__name__}{_described(columns)}, and neither rows nor "
                "columns of equal length: write one object a line, or a list of objects"
            )
        return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]

    def _where(self, row: int | None) -> str:
        return str(self.file) if row is None else f"{self.file}, row {row + 1}"

    def _parse(self, row: int | None, content: bytes) -> Any:
        try:
            return json.loads(content.decode("utf-8"))
        except UnicodeDecodeError as error:
            where = self._where(row)
            if row is None:
                line = content.count(b"\n", 0, error.start) + 1
                where = f"{where}, line {line}"
            raise TableError(
                f"{where}: byte 0x{content[error.start]:02x} at position {error.start} is not UTF-8: save "
                "the file as UTF-8, for example with iconv -f ISO-8859-1 -t UTF-8"
            ) from error
        except json.JSONDecodeError as error:
            place = error if row is None else f"{error.msg} at column {error.colno}"
            raise TableError(f"{self._where(row)}: not JSON ({place}): correct it") from error
        except (ValueError, RecursionError) as error:  # thousands of digits or of nested brackets
            reason = str(error).partition(";")[0]
            raise TableError(f"{self._where(row)}: cannot be read ({reason}): write it as a text") from error

    def _object(self, row: int, record: Any) -> Record:
        if not isinstance(record, dict):
            raise TableError(
                f"{self._where(row)}: holds a value of type {type(record).__name__}, expected an object"
            )
        return record


def _described(columns: Record) -> str:
    """The keys of an object, with the size of what they hold, for messages; "" without keys."""
    parts = [
        f"{key} ({type(value).__name__} of {len(value)})" if isinstance(value, list | dict) else key
        for key, value in columns.items()
    ]
    return f" of {', '.join(parts[:10])}" if parts else ""


class ParquetTable:
    """A Parquet file."""

    def __init__(self, file: Path):
        self.file = file
        try:
            with pq.ParquetFile(file) as opened:
                self.rows = opened.metadata.num_rows
                self.schema = opened.schema_arrow
        except (pa.ArrowException, OSError) as error:
            raise TableError(f"{file}: no Parquet file that can be read: {error}") from error

    def __len__(self) -> int:
        return self.rows

    def read(self, rows: Sequence[int], wanted: Sequence[str]) -> tuple[list[Record], list[str]]:
        present = [name for name in wanted if name in self.schema.names]
        for name in present:
            self._check_type(name)
        records: list[Record] = []
        if not present:
            return [dict.fromkeys(wanted) for _ in rows], self.schema.names
        try:
            with pq.ParquetFile(self.file) as opened:
                groups = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
                for group, portion in enumerate(portions(rows, groups)):
                    if portion:
                        found = opened.read_row_group(group, columns=present).select(present).take(portion)
                        records += found.to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise TableError(f"{self.file} cannot be read: {error}") from error
        absent = dict.fromkeys(name for name in wanted if name not in present)
        return [record | absent for record in records], self.schema.names

    def _check_type(self, name: str) -> None:
        if self.schema.names.count(name) > 1:
            raise TableError(f"{self.file}: two columns are called {name!r}: rename one of them")
        kind = self.schema.field(name).type
        if pa.types.is_temporal(kind):
            raise TableError(
                f"{self.file}: column {name!r} holds dates or times ({kind}), expected texts or numbers: "
                "name another column, or write it as a text into a copy of the data"
            )


class HubTable:
    """A data set loaded by the library `datasets`.

    Attributes:
        revision: its commit on the Hub, by which the library names the folder in its cache; None if unknown.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset
        folders = {Path(file["filename"]).parent.name for file in dataset.cache_files}
        self.revision = next(filter(COMMIT.fullmatch, folders), None)

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, rows: Sequence[int], wanted: Sequence[str]) -> tuple[list[Record], list[str]]:
        names = self.dataset.column_names
        present = [name for name in wanted if name in names]
        absent = dict.fromkeys(name for name in wanted if name not in names)
        records = self.dataset.select_columns(present).select(rows).to_list()
        return [record | absent for record in records], names
