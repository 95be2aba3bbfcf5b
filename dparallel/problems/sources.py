"""Problems from data sets: files, folders, or the Hugging Face Hub."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from textwrap import shorten
from typing import Any

from dparallel.config.base import UserError
from dparallel.config.problems import ColumnText, ProblemsConfig, ProtocolConfig, SourceConfig
from dparallel.problems.splits import open_source
from dparallel.problems.tables import Record, TableError, portions


class ProblemsError(UserError):
    """Problems cannot be read; the message names the data set, the row or column, and the remedy."""


@dataclass(frozen=True)
class Problem:
    """A problem with everything needed to ask it and to judge the response.

    Attributes:
        prompt: the question, without system text, few-shot examples and chat template.
        prefill: start of the assistant's response, which the model continues.
        reference: a correct response; None if unknown.
        extra: columns for scorers only, as JSON values; not stored in trajectory shards.
    """

    problem_id: str
    source: str
    prompt: str
    prefill: str = ""
    reference: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def dataset_problems(config: ProblemsConfig) -> list[Problem]:
    """The problems of all sources, in order.

    Raises:
        ProblemsError: a data set is missing, empty or too short, or lacks a required column.
    """
    return [problem for source in config.sources for problem in _read(source, config.protocol)]


def _read(source: SourceConfig, protocol: ProtocolConfig) -> list[Problem]:
    prompt = ColumnText(protocol.prompt if source.prompt is None else source.prompt)
    prefill = ColumnText(protocol.prefill)
    label, name_of_file = source.label, Path(source.path).stem
    filled = dict.fromkeys([*prompt.columns, *prefill.columns])
    reference, identity = source.reference or "reference", source.id or "id"
    wanted = list(dict.fromkeys([*filled, reference, identity, *protocol.extra]))
    required = [*filled, *protocol.extra, *filter(None, (source.reference, source.id))]
    problems = []
    for row, record in _rows(source, wanted, required):
        where = f"{label}, row {row + 1}"
        texts = {name: _text(where, name, record[name]) or "" for name in filled}
        for name, text in texts.items():
            if not text.strip():
                raise ProblemsError(f"{where}: column {name!r} of the prompt is empty; leave the row out")
        problems.append(
            Problem(
                problem_id=_text(where, identity, record[identity]) or f"{name_of_file}-{row + 1:05d}",
                source=label,
                prompt=prompt.fill(texts),
                prefill=prefill.fill(texts),
                reference=_text(where, reference, record[reference]),
                extra={name: _json_value(where, name, record[name]) for name in protocol.extra},
            )
        )
    return problems


def _rows(source: SourceConfig, wanted: list[str], required: list[str]) -> list[tuple[int, Record]]:
    """Rows of a source with their numbers, counted from 0 in the unsliced split."""
    try:
        parts = open_source(source)
        lengths = [len(rows) for _, rows in parts]
        chosen = _chosen(source, sum(lengths))
        found: list[tuple[int, Record]] = []
        for (table, numbers), portion in zip(parts, portions(chosen, lengths), strict=True):
            if not portion:
                continue
            rows = [numbers[place] for place in portion]
            records, columns = table.read(rows, wanted)
            if missing := [name for name in required if name not in columns]:
                raise ProblemsError(
                    f"{source.label}: no column {missing[0]!r}; its columns: {', '.join(columns)}"
                )
            found += zip(rows, records, strict=True)
        return found
    except TableError as error:
        named = str(error).startswith(source.path)
        raise ProblemsError(str(error) if named else f"{source.label}: {error}") from error


def _chosen(source: SourceConfig, rows: int) -> Sequence[int]:
    count = rows if source.count is None else source.count
    if not rows:
        raise ProblemsError(f"{source.label} holds 0 problems: give another split, slice or file")
    if count > rows:
        raise ProblemsError(f"{source.label} holds {rows} problems, wanted {count}: lower count")
    return range(count) if source.seed is None else sorted(Random(source.seed).sample(range(rows), count))


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


def _json_value(where: str, name: str, value: Any) -> Any:
    """Check that a value for scorers can be stored as JSON."""
    if isinstance(value, dict):
        return {str(key): _json_value(where, name, inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(where, name, inner) for inner in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise ProblemsError(
        f"{where}: column {name!r} holds {shorten(repr(value), 80)}, which JSON cannot hold: write it as a "
        "text into a copy of the data"
    )
