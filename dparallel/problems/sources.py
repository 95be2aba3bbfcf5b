"""Problems from data sets: files, folders, or the Hugging Face Hub."""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from textwrap import shorten
from typing import Any, TypeVar

from dparallel.config.base import UserError
from dparallel.config.problems import ProblemsConfig
from dparallel.config.protocol import ProtocolConfig
from dparallel.config.sources import PROBLEM_FILES, ColumnText, SourceConfig, kind_of
from dparallel.problems.splits import open_source
from dparallel.problems.tables import HubError, Record, TableError, portions

log = logging.getLogger(__name__)

ITEM = re.compile(r"(.+)\[(\d+)\]")  # an item of a list: `tests[0]`


class ProblemsError(UserError):
    """Problems cannot be read; the message names the data set, the row or column, and the remedy."""


@dataclass(frozen=True)
class Problem:
    """A problem with everything needed to ask it and to judge the response.

    Attributes:
        prompt: the question, without system text, few-shot examples and chat template.
        prefill: start of the assistant's response, which the model continues.
        turns: chat turns before the question that belong to this problem, as (role, text).
        reference: a correct response; None if unknown.
        extra: columns for scorers only, as JSON values; not stored in trajectory shards.
        origin: file or data set and row that it was read from, for messages; a copy's problems have the
            `source` of the published data set.
    """

    problem_id: str
    source: str
    prompt: str
    prefill: str = ""
    reference: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    turns: tuple[tuple[str, str], ...] = ()
    origin: str = field(default="", compare=False)

    @property
    def where(self) -> str:
        """Names it in messages."""
        return f"problem {self.problem_id} ({self.origin or self.source})"


def dataset_problems(config: ProblemsConfig) -> list[Problem]:
    """The selected problems of all sources, in order; without sources, of the protocol's data.

    Problems of a local copy (`path`) have the ids and the source of the published data set.

    Raises:
        ProblemsError: a data set is missing, empty or too short, or lacks a required column.
    """
    reads = config.reads()
    if config.path is not None and not any(source.files() for source, _ in reads):
        raise ProblemsError(f"path={config.path}: no such file or folder (looked in {Path.cwd()})")
    several = len(reads) > 1 and not config.sources
    try:
        problems = [
            problem for source, named in reads for problem in _read(source, named, config.protocol, several)
        ]
    except HubError as error:
        raise ProblemsError(f"{error}; {_copy(config)}") from error
    _check_number(config, len(problems))
    return selected(problems, config, " and ".join(source.label for source, _ in reads))


def _copy(config: ProblemsConfig) -> str:
    """What to do without the Hub."""
    if config.sources:
        return "offline, give the path of a local copy"
    origin = config.protocol.file.url or f"the data set {config.protocol.data[0].path}"
    return f"offline, get a copy of {origin} and give path: COPY (dparallel eval: --path COPY)"


def _check_number(config: ProblemsConfig, number: int) -> None:
    """Warn of a copy of published data that is not whole."""
    published = config.protocol.problems
    if not config.sources and published not in (None, number):
        _tell(
            f"{config.path or config.protocol.data[0].path} holds {number} problems, and the published data "
            f"set {published}: numbers do not compare with published ones"
        )


@cache  # once per process; problems are loaded by checks and by stages
def _tell(message: str) -> None:
    log.warning("%s", message)


Item = TypeVar("Item")


def selected(problems: Sequence[Item], config: ProblemsConfig, label: str) -> list[Item]:
    """What `rows`, `count` and `seed` select of all problems; `label` names them in messages."""
    if config.rows is not None:
        start, stop = (_place(bound, len(problems)) for bound in config.rows.strip("[]").split(":"))
        problems = problems[start:stop]
        label = f"{label} {config.rows}"
    return [problems[place] for place in chosen_rows(label, config.count, config.seed, len(problems))]


def _place(bound: str, rows: int) -> int | None:
    """A bound of a slice: a row, or a percentage of the rows."""
    if not bound:
        return None
    return round(rows * int(bound[:-1]) / 100) if bound.endswith("%") else int(bound)


def _read(
    source: SourceConfig, named: SourceConfig, protocol: ProtocolConfig, several: bool
) -> list[Problem]:
    """The problems of a source.

    Args:
        named: the source that names the problems: `source`, or the published one that it is a copy of.
        several: whether the ids of problems without id contain the subset.
    """
    prompt = ColumnText(protocol.prompt if source.prompt is None else source.prompt)
    prefill = ColumnText(protocol.prefill)
    label = source.label
    prefix = "-".join(filter(None, [_stem(named.path), named.subset if several else None]))
    filled = list(dict.fromkeys([*prompt.columns, *prefill.columns]))
    reference, identity = source.reference or "reference", source.id or "id"
    wanted = list(dict.fromkeys([*filled, reference, identity, *protocol.extra]))
    required = [*filled, *protocol.extra, *filter(None, (source.reference, source.id))]
    required += [name for name in wanted if name in source.columns]
    problems = []
    for row, record in _rows(source, wanted, required):
        where = f"{label}, row {row + 1}"
        texts = {name: _text(where, name, record[name]) or "" for name in filled}
        for name, text in texts.items():
            if not text.strip():
                raise ProblemsError(f"{where}: column {name!r} of the prompt is empty; leave the row out")
        stated = _text(where, reference, record[reference])
        problems.append(
            Problem(
                problem_id=_text(where, identity, record[identity]) or f"{prefix}-{row + 1:05d}",
                source=named.name,
                prompt=prompt.fill(texts),
                prefill=prefill.fill(texts),
                reference=stated if (stated or "").strip() else None,
                extra={name: json_value(where, name, record[name]) for name in protocol.extra},
                origin=where,
            )
        )
    return problems


def _stem(path: str) -> str:
    name = Path(path)
    return name.name.removesuffix(kind) if (kind := kind_of(name)) in PROBLEM_FILES else name.stem


def _rows(source: SourceConfig, wanted: list[str], required: list[str]) -> list[tuple[int, Record]]:
    """Rows of a source with their numbers, counted from 0 in the unsliced split.

    Records have the names in `wanted`. `tests[0]` is the first item of the lists in the column `tests`,
    unless a column has this very name.
    """
    items = [item[1] for name in wanted if (item := ITEM.fullmatch(name))]
    read = list(dict.fromkeys(source.columns.get(name, name) for name in [*wanted, *items]))
    try:
        parts = open_source(source)
        lengths = [len(rows) for _, rows in parts]
        chosen = chosen_rows(source.label, source.count, source.seed, sum(lengths))
        found: list[tuple[int, Record]] = []
        for (table, numbers), portion in zip(parts, portions(chosen, lengths), strict=True):
            if not portion:
                continue
            rows = [numbers[place] for place in portion]
            records, columns = table.read(rows, read)
            places = {name: _place_of(name, source, columns) for name in wanted}
            if missing := [places[name][0] for name in required if places[name][0] not in columns]:
                raise ProblemsError(
                    f"{source.label}: no column {missing[0]!r}; its columns: {', '.join(columns)}"
                )
            for row, record in zip(rows, records, strict=True):
                where = f"{source.label}, row {row + 1}"
                found.append((row, {name: _cell(where, record, *place) for name, place in places.items()}))
        return found
    except HubError as error:
        raise HubError(f"{source.label}: {error}") from error
    except TableError as error:
        named = str(error).startswith(source.path)
        raise ProblemsError(str(error) if named else f"{source.label}: {error}") from error


def _place_of(name: str, source: SourceConfig, columns: Sequence[str]) -> tuple[str, int | None]:
    """The column that holds `name`, and the index in its lists if `name` is an item of a list."""
    column = source.columns.get(name, name)
    if column not in columns and (item := ITEM.fullmatch(name)):
        holder = source.columns.get(item[1], item[1])
        if holder in columns:
            return holder, int(item[2])
    return column, None


def _cell(where: str, record: Record, column: str, index: int | None) -> Any:
    value = record[column]
    if index is None:
        return value
    if not isinstance(value, list) or index >= len(value):
        held = f"{len(value)} items" if isinstance(value, list) else shorten(repr(value), 80)
        raise ProblemsError(
            f"{where}: column {column!r} holds {held}, and the prompt names item [{index}] of a list; leave "
            "the row out"
        )
    return value[index]


def chosen_rows(label: str, count: int | None, seed: int | None, rows: int) -> Sequence[int]:
    """Numbers of the chosen ones of `rows` rows: all, the first `count`, or a random selection, ascending."""
    if not rows:
        raise ProblemsError(f"{label} holds 0 problems: give another split, slice or file")
    if count is not None and count > rows:
        raise ProblemsError(f"{label} holds {rows} problems, wanted {count}: lower count")
    count = rows if count is None else count
    return range(count) if seed is None else sorted(Random(seed).sample(range(rows), count))


def _text(where: str, name: str, value: Any) -> str | None:
    """A cell as text; 3.0 becomes "3", since a column of integers with missing values is read as floats."""
    if value is None:
        return None
    if isinstance(value, str):
        if not value.isascii():
            _check_characters(where, name, value)
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    shown = shorten(repr(value), 80)
    raise ProblemsError(
        f"{where}: column {name!r} holds {shown}, expected a text or a number: name another column, or "
        "write it as a text into a copy of the data"
    )


def _check_characters(where: str, name: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ProblemsError(
            f"{where}: column {name!r} holds half a character ({text[error.start]!r}): correct it"
        ) from error


def json_value(where: str, name: str, value: Any) -> Any:
    """Check that a value for scorers can be stored as JSON."""
    if isinstance(value, dict):
        return {str(key): json_value(where, name, inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(where, name, inner) for inner in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise ProblemsError(
        f"{where}: column {name!r} holds {shorten(repr(value), 80)}, which JSON cannot hold: write it as a "
        "text into a copy of the data"
    )
