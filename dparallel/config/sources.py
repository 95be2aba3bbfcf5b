"""Settings of data sources, and texts made of their columns."""

import os
from collections.abc import Mapping
from glob import glob
from pathlib import Path
from string import Formatter
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from dparallel.config.base import Config
from dparallel.config.paths import BelowFolder, PathOrHubId

PROBLEM_FILES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")


def kind_of(file: Path) -> str:
    """The suffix by which the kind of a file is recognized; `.gz` counts together with the suffix before."""
    return "".join(file.suffixes[-2:]) if file.suffix == ".gz" else file.suffix


class ColumnText(Formatter):
    """A format string over columns. Braces hold the whole column name: `{q.text}` is the column `q.text`.

    Attributes:
        columns: names of the columns used.
    """

    def __init__(self, text: str, setting: str = "prompt"):
        """Parse `text`; a ValueError names the `setting` if it is not a valid format string."""
        self.text = text
        found: dict[str, str] = {}
        try:
            parts = list(self.parse(text))
            if any(column == "" for _, column, _, _ in parts):
                raise ValueError("it must name the columns it is made of, as {question}")
            self.vformat(text, (), _Recorder(found))
        except ValueError as error:
            reason = f"{error}; columns come as texts; write {{{{ and }}}} for braces"
            raise ValueError(f"{setting}={text!r}: {reason}") from error
        self.columns = list(found)
        self.plain = not any(form or conversion for _, _, form, conversion in parts)
        self.parts = [(literal, column) for literal, column, _, _ in parts]

    def fill(self, texts: Mapping[str, str]) -> str:
        """The text with the columns replaced by their values."""
        if not self.plain:
            return self.vformat(self.text, (), texts)
        return "".join(
            literal if column is None else literal + texts[column] for literal, column in self.parts
        )

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[str, str]:
        return kwargs[field_name], field_name


class _Recorder(dict[str, str]):
    """Returns an empty text for every column and records the names requested."""

    def __init__(self, found: dict[str, str]):
        self.found = found

    def __missing__(self, column: str) -> str:
        return self.found.setdefault(column, "")


def check_prompt(prompt: str) -> None:
    if not ColumnText(prompt).columns:
        raise ValueError(f"prompt={prompt!r} must name the columns it is made of, as {{question}}")


def _matters(file: Path, folder: Path) -> bool:
    """Whether a changed file may change the problems; README.md may assign files to splits."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and (kind_of(file) in PROBLEM_FILES or file.name == "README.md")


class SourceConfig(Config):
    """A data set: files, a folder, or a data set on the Hugging Face Hub.

    Args:
        path: a JSONL, JSON (both also with gzip) or Parquet file (or a pattern such as `data/*.parquet`), a
            folder with files of one of these types, including sub-folders, or a Hub id such as
            `openai/gsm8k`.
        subset: subset of a Hub data set; of a folder, a subset defined in its dataset card (README.md), or a
            sub-folder.
        split: split of a Hub data set or folder. The files of a folder belong to the split given by the
            dataset card or by their names (`test.jsonl`, `test/a.jsonl`), otherwise to `train`. Slices are
            allowed: `train[:500]`; for a single file only the slice counts. Problems without an id are named
            by their row in the unsliced split.
        revision: revision of a Hub data set, for these only.
        prompt: a format string over the columns of this source; overrides the protocol's prompt.
        reference, id: column names; by default columns named `reference` and `id`, if present. An empty
            reference is none.
        columns: columns of this source that have another name than the prompt, `reference`, `id` and the
            protocol use: `{text: task}` reads the column `task` as `text`.
        count: number of rows: the first ones, or a random selection if `seed` is given.
        seed: of the random selection.
    """

    path: PathOrHubId
    subset: BelowFolder | None = None
    split: BelowFolder = "train"
    revision: str | None = None
    prompt: str | None = None
    reference: str | None = Field(None, min_length=1)
    id: str | None = Field(None, min_length=1)
    columns: dict[str, str] = {}
    count: PositiveInt | None = None
    seed: NonNegativeInt | None = None

    @property
    def label(self) -> str:
        """The source in messages."""
        return self._described(self.path)

    @property
    def name(self) -> str:
        """The source in records; of a local path only the last part, which is the same on all machines."""
        return self._described(Path(self.path).name if self.files() else self.path)

    def _described(self, path: str) -> str:
        part = [self.subset, None if self.split == "train" else self.split]
        return " ".join([path, *filter(None, part)])

    def how_names(self) -> set[str]:
        """Where local files lie does not matter; their content is part of the stage key."""
        return super().how_names() | ({"path"} if self.files() else set())

    def files(self) -> list[Path]:
        """Its local files; empty for a Hub data set."""
        path = Path(self.path)
        if os.path.isfile(path):  # a file name may look like a pattern
            return [path]
        if os.path.isdir(path):
            return sorted(file for file in path.rglob("*") if file.is_file() and _matters(file, path))
        return sorted(Path(file) for file in glob(self.path) if os.path.isfile(file))

    @model_validator(mode="after")
    def _consistent(self) -> "SourceConfig":
        if self.prompt is not None:
            check_prompt(self.prompt)
        if self.seed is not None and self.count is None:
            raise ValueError(f"seed={self.seed} draws count rows: give count, or drop seed")
        return self
