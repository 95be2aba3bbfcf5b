"""Further columns of the rows that problems were read from."""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from dparallel.config.problems import ProblemsConfig
from dparallel.config.sources import SourceConfig
from dparallel.problems.sources import ProblemsError, chosen_rows, selected
from dparallel.problems.splits import open_source
from dparallel.problems.tables import Record, Table, TableError, portions


class Row(NamedTuple):
    """A row of a data set: its source, the number of the part of all data and the part, its number there."""

    source: SourceConfig
    part: int
    table: Table
    number: int

    @property
    def where(self) -> str:
        """Names it in messages."""
        return f"{self.source.label}, row {self.number + 1}"


class Columns:
    """Columns of a data set, read for a few problems at a time."""

    def __init__(self, config: ProblemsConfig, names: Sequence[str]):
        """Find the rows; nothing of the columns is read yet.

        Args:
            config: problems with `benchmark: dataset`.
            names: names of the columns, before `columns` of a source renames them.

        Raises:
            ProblemsError: a data set is missing or too short.
        """
        self._names = list(names)
        rows: list[Row] = []
        part = 0
        reads = config.reads()
        for source, _ in reads:
            try:
                parts = open_source(source)
            except TableError as error:
                raise ProblemsError(f"{source.label}: {error}") from error
            lengths = [len(numbers) for _, numbers in parts]
            chosen = chosen_rows(source.label, source.count, source.seed, sum(lengths))
            for (table, numbers), portion in zip(parts, portions(chosen, lengths), strict=True):
                rows += [Row(source, part, table, numbers[place]) for place in portion]
                part += 1
        self.rows = selected(rows, config, " and ".join(source.label for source, _ in reads))

    def read(self, places: range) -> list[Record]:
        """The columns of the problems at `places`, by the names given at the beginning.

        Raises:
            ProblemsError: a column is missing, or a file cannot be read.
        """
        records: list[Record] = []
        for _, group in groupby(self.rows[places.start : places.stop], key=lambda row: row.part):
            records += self._read(list(group))
        return records

    def _read(self, rows: Sequence[Row]) -> list[Record]:
        source, _, table, _ = rows[0]
        columns = {name: source.columns.get(name, name) for name in self._names}
        try:
            records, present = table.read([row.number for row in rows], list(columns.values()))
        except TableError as error:
            raise ProblemsError(f"{source.label}: {error}") from error
        for column in columns.values():
            if column not in present:
                raise ProblemsError(
                    f"{source.label}: no column {column!r}; its columns: {', '.join(present)}"
                )
        return [{name: record[column] for name, column in columns.items()} for record in records]
