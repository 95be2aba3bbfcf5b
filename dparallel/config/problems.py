"""The settings of problems: where they come from, how they are asked, how a response is scored."""

from glob import glob
from pathlib import Path
from string import Formatter
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from dparallel.config.base import Config


class SourceConfig(Config):
    """One data set: files, a folder, or a name on the hub.

    Args:
        path: a JSONL, JSON or Parquet file (or a pattern such as `data/*.parquet`), a folder of them, or
            a name on the hub such as `openai/gsm8k`.
        subset, split, revision: which part of a hub data set or a folder; any of them may be sliced,
            `train[:500]`. Of a file only the slice of `split` matters.
        prompt: a format string over the columns; write `{{` for a brace.
        reference, id: columns; None takes those of these names where there are any.
        count: how many rows; the first ones, or drawn by `seed`.
    """

    path: str = Field(min_length=1)
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    prompt: str = "{prompt}"
    reference: str | None = None
    id: str | None = None
    count: PositiveInt | None = None
    seed: NonNegativeInt | None = None

    @property
    def prompt_columns(self) -> list[str]:
        return [name for _, name, _, _ in Formatter().parse(self.prompt) if name is not None]

    @property
    def label(self) -> str:
        """Its name in messages and records."""
        part = [self.subset, None if self.split == "train" else self.split]
        return " ".join([self.path, *filter(None, part)])

    def files(self) -> list[Path]:
        """Its files on this machine; none of a name on the hub."""
        if Path(self.path).is_dir():
            return sorted(file for file in Path(self.path).rglob("*") if file.is_file())
        return sorted(Path(file) for file in glob(self.path))

    @model_validator(mode="after")
    def _consistent(self) -> "SourceConfig":
        try:
            columns = self.prompt_columns
        except ValueError as error:
            raise ValueError(f"prompt={self.prompt!r}: {error}; write {{{{ and }}}} for braces") from error
        if not all(columns) or not columns:
            raise ValueError(f"prompt={self.prompt!r} must name the columns it is made of, as {{question}}")
        if self.seed is not None and self.count is None:
            raise ValueError(f"seed={self.seed} draws count rows: give count, or drop seed")
        return self


class ProblemsConfig(Config):
    """Which problems, how they become prompts, and how a response is scored.

    Args:
        benchmark: `coins` is generated, from `split`, `count` and `seed`; `dataset` reads `sources`, one
            after another.
        chat: the problem is a user's turn, in the checkpoint's own chat template; else the prompt is
            the text as it is.
        chat_template: file of a Jinja template, for a checkpoint that brings none.
        scoring: of data sets. `exact`: the response is the reference; `flexible_extract`: its last
            number is the reference's final answer.
    """

    benchmark: Literal["coins", "dataset"]
    split: Literal["train", "distillation", "validation", "test"] = "train"
    count: PositiveInt | None = None
    seed: NonNegativeInt = 0
    sources: tuple[SourceConfig, ...] = ()
    chat: bool = False
    chat_template: str | None = None
    scoring: Literal["exact", "flexible_extract"] = "exact"

    def files(self) -> list[Path]:
        """Every file of this machine that these problems are made from, so that a change can be seen."""
        files = [file for source in self.sources for file in source.files()]
        return files if self.chat_template is None else [*files, Path(self.chat_template)]

    @model_validator(mode="after")
    def _consistent(self) -> "ProblemsConfig":
        if self.benchmark == "dataset":
            if not self.sources:
                raise ValueError("benchmark='dataset' needs sources: a list of data sets, each with its path")
            if (self.split, self.count, self.seed) != ("train", None, 0):
                raise ValueError(
                    f"benchmark='dataset' with split={self.split!r}, count={self.count}, seed={self.seed}: "
                    "give them to each of its sources"
                )
        elif self.sources or self.count is None or self.scoring != "exact":
            raise ValueError(
                f"benchmark='coins' with count={self.count}, {len(self.sources)} sources, "
                f"scoring={self.scoring!r}: it is generated and has its own score, so give count alone"
            )
        if self.chat_template is not None and not self.chat:
            raise ValueError(f"chat_template={self.chat_template!r} has no effect with chat=false")
        return self
