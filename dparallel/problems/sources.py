"""Problems from data sets: files, folders, or names on the hub."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from dparallel.config.base import UserError
from dparallel.config.problems import ProblemsConfig, ProtocolConfig, SourceConfig, columns_of, fill

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class ProblemsError(UserError):
    """Problems that cannot be read; the message names the data set, the row or column, and the remedy."""


@dataclass(frozen=True)
class Problem:
    """Data that travels whole from its source to its verdict.

    Attributes:
        prompt: the question, without system text, examples and chat template.
        prefill: the beginning of the assistant's response; what a model generates comes after it.
        reference: one right response; None where none is known.
        extra: what only a scorer reads, by column; JSON values. It is part of no shard.
    """

    problem_id: str
    source: str
    prompt: str
    prefill: str = ""
    reference: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def dataset_problems(config: ProblemsConfig) -> list[Problem]:
    """The problems of every source, one source after another.

    Raises:
        ProblemsError: a data set that is missing, empty, too short, or without a column that is asked for.
    """
    return [problem for source in config.sources for problem in _read(source, config.protocol)]


def _read(source: SourceConfig, protocol: ProtocolConfig) -> list[Problem]:
    dataset = _load(source)
    prompt = protocol.prompt if source.prompt is None else source.prompt
    texts = dict.fromkeys([*columns_of(prompt, "prompt"), *columns_of(protocol.prefill, "prefill")])
    reference = _column(dataset, source.reference, "reference")
    identity = _column(dataset, source.id, "id")
    columns = dict.fromkeys([*texts, *filter(None, (reference, identity)), *protocol.extra])
    if missing := [name for name in columns if name not in dataset.column_names]:
        raise ProblemsError(
            f"{source.label}: no column {missing[0]!r}; its columns: {', '.join(dataset.column_names)}"
        )
    rows = _chosen_rows(source, len(dataset))
    records = dataset.select_columns(list(columns)).select(rows).to_list()

    problems = []
    for row, record in zip(rows, records, strict=True):
        where = f"{source.label}, row {row + 1}"
        filled = {name: _text(where, name, record[name]) for name in texts}
        for name, text in filled.items():
            if not text.strip():
                raise ProblemsError(f"{where}: column {name!r} of the prompt is empty; leave the row out")
        identifier = _optional_text(where, identity, record) or f"{Path(source.path).stem}-{row + 1:05d}"
        problems.append(
            Problem(
                problem_id=identifier,
                source=source.label,
                prompt=fill(prompt, filled),
                prefill=fill(protocol.prefill, filled),
                reference=_optional_text(where, reference, record),
                extra={name: record[name] for name in protocol.extra},
            )
        )
    return problems


def _column(dataset: Any, asked: str | None, default: str) -> str | None:
    """A column that was named must exist; the default one may be absent."""
    return asked or (default if default in dataset.column_names else None)


def _chosen_rows(source: SourceConfig, rows: int) -> Sequence[int]:
    count = rows if source.count is None else source.count
    if not rows or count > rows:
        raise ProblemsError(f"{source.label} holds {rows} problems, wanted {max(1, count)}: lower count")
    return range(count) if source.seed is None else sorted(Random(source.seed).sample(range(rows), count))


def _optional_text(where: str, name: str | None, record: dict[str, Any]) -> str | None:
    return None if name is None or record[name] is None else _text(where, name, record[name])


def _text(where: str, name: str, value: Any) -> str:
    """A text as it is, a number as it is written: 1.5, and 3 for 3.0, which a column with gaps makes of 3."""
    if value is None:
        return ""
    if isinstance(value, str):
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
