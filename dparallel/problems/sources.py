"""Problems from data sets: files, folders, or names on the hub."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from dparallel.config.base import UserError
from dparallel.config.problems import ProblemsConfig, SourceConfig

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class ProblemsError(UserError):
    """Problems that cannot be read; the message names the data set, the row or column, and the remedy."""


@dataclass(frozen=True)
class Problem:
    """`reference` is one right response; None where none is known."""

    problem_id: str
    source: str
    prompt: str
    reference: str | None


def dataset_problems(config: ProblemsConfig) -> list[Problem]:
    """The problems of every source, one source after another.

    Raises:
        ProblemsError: a data set that is missing, empty, too short, or without a column that is asked for.
    """
    return [problem for source in config.sources for problem in _read(source)]


def _read(source: SourceConfig) -> list[Problem]:
    dataset = _load(source)
    reference = _column(dataset, source.reference, "reference")
    identity = _column(dataset, source.id, "id")
    columns = dict.fromkeys([*source.prompt_columns, *filter(None, (reference, identity))])
    if missing := [name for name in columns if name not in dataset.column_names]:
        raise ProblemsError(
            f"{source.label}: no column {missing[0]!r}; its columns: {', '.join(dataset.column_names)}"
        )
    rows = _chosen_rows(source, len(dataset))
    records = dataset.select_columns(list(columns)).select(rows).to_list()
    return [
        _problem(source, row, record, reference, identity) for row, record in zip(rows, records, strict=True)
    ]


def _column(dataset: Any, asked: str | None, default: str) -> str | None:
    """A column that was named must exist; the default one may be absent."""
    return asked or (default if default in dataset.column_names else None)


def _chosen_rows(source: SourceConfig, rows: int) -> Sequence[int]:
    count = rows if source.count is None else source.count
    if not rows or count > rows:
        raise ProblemsError(f"{source.label} holds {rows} problems, wanted {max(1, count)}: lower count")
    return range(count) if source.seed is None else sorted(Random(source.seed).sample(range(rows), count))


def _problem(
    source: SourceConfig, row: int, record: dict[str, Any], reference: str | None, identity: str | None
) -> Problem:
    where = f"{source.label}, row {row + 1}"
    texts = {name: _text(where, name, value) for name, value in record.items()}
    for name in source.prompt_columns:
        if not (texts[name] or "").strip():
            raise ProblemsError(f"{where}: column {name!r} of the prompt is empty; leave the row out")
    try:
        prompt = source.prompt.format_map(texts)
    except ValueError as error:
        raise ProblemsError(
            f"{where}: prompt={source.prompt!r} cannot be filled in ({error}): columns come as texts, so "
            "name them alone, as {question}"
        ) from error
    return Problem(
        problem_id=(texts[identity] if identity else None) or f"{Path(source.path).stem}-{row + 1:05d}",
        source=source.label,
        prompt=prompt,
        reference=texts[reference] if reference else None,
    )


def _text(where: str, name: str, value: Any) -> str | None:
    """A text as it is, a number as it is written: 1.5, and 3 for 3.0, which a column with gaps makes of 3."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    raise ProblemsError(
        f"{where}: column {name!r} holds {value!r}, expected a text or a number: name another column, or "
        "write it as a text into a copy of the data"
    )


def _load(source: SourceConfig) -> Any:
    """The `datasets.Dataset` of one source."""
    import datasets  # here, since it takes a second

    datasets.disable_progress_bars()
    arguments = _local(source) or {
        "path": source.path,
        "name": source.subset,
        "revision": source.revision,
    }
    try:
        return datasets.load_dataset(**arguments, split=source.split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, StopIteration) as error:
        reason = str(error.__cause__ or error) or "it holds 0 problems"
        hint = "" if source.files() else "; offline, give the path of a local copy"
        raise ProblemsError(f"{source.label} cannot be read: {reason}{hint}") from error


def _local(source: SourceConfig) -> dict[str, Any] | None:
    """How `datasets` reads these files; None for a folder or a name on the hub, which it knows itself."""
    path = Path(source.path)
    if path.is_dir():
        return None
    files = source.files()
    if not files and (path.suffix in FORMATS or path.is_absolute() or source.path.count("/") > 1):
        raise ProblemsError(f"{path}: no such problems file (looked in {Path.cwd()})")
    if not files:
        return None
    formats = {FORMATS.get(file.suffix) for file in files}
    if len(formats) > 1 or None in formats:
        raise ProblemsError(f"{path}: give files of one kind, named {', '.join(FORMATS)}")
    split = source.split.partition("[")[0]  # the files are this split, whatever it is called
    return {"path": formats.pop(), "data_files": {split: [str(file) for file in files]}}
