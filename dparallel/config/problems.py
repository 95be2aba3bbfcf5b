"""Settings of problems: data sources, prompt format, and scoring."""

from collections.abc import Mapping
from glob import glob
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationInfo, field_validator, model_validator

from dparallel.config.base import Config, LocalPath

PROBLEM_FILES = (".jsonl", ".json", ".parquet")
COINS_LIMIT = 100_000  # drawing a distinct problem takes up to 0.1 ms; each split has millions of them


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


def _check_prompt(prompt: str) -> None:
    if not ColumnText(prompt).columns:
        raise ValueError(f"prompt={prompt!r} must name the columns it is made of, as {{question}}")


def _matters(file: Path, folder: Path) -> bool:
    """Whether a changed file may change the problems; README.md may assign files to splits."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and (file.suffix in PROBLEM_FILES or file.name == "README.md")


class SourceConfig(Config):
    """A data set: files, a folder, or a data set on the Hugging Face Hub.

    Args:
        path: a JSONL, JSON or Parquet file (or a pattern such as `data/*.parquet`), a folder with files of
            one of these types, including sub-folders, or a Hub id such as `openai/gsm8k`.
        subset: subset of a Hub data set; of a folder, a subset defined in its dataset card (README.md), or a
            sub-folder.
        split: split of a Hub data set or folder. The files of a folder belong to the split given by the
            dataset card or by their names (`test.jsonl`, `test/a.jsonl`), otherwise to `train`. Slices are
            allowed: `train[:500]`; for a single file only the slice counts. Problems without an id are named
            by their row in the unsliced split.
        revision: revision of a Hub data set, for these only.
        prompt: a format string over the columns of this source; overrides the protocol's prompt.
        reference, id: column names; by default columns named `reference` and `id`, if present.
        count: number of rows: the first ones, or a random selection if `seed` is given.
        seed: of the random selection.
    """

    path: LocalPath
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    prompt: str | None = None
    reference: str | None = Field(None, min_length=1)
    id: str | None = Field(None, min_length=1)
    count: PositiveInt | None = None
    seed: NonNegativeInt | None = None

    @property
    def label(self) -> str:
        """Name of the source in messages and records."""
        part = [self.subset, None if self.split == "train" else self.split]
        return " ".join([self.path, *filter(None, part)])

    def files(self) -> list[Path]:
        """Its local files; empty for a Hub data set."""
        path = Path(self.path)
        if path.is_file():  # a file name may look like a pattern
            return [path]
        if path.is_dir():
            return sorted(file for file in path.rglob("*") if file.is_file() and _matters(file, path))
        return sorted(Path(file) for file in glob(self.path) if Path(file).is_file())

    @model_validator(mode="after")
    def _consistent(self) -> "SourceConfig":
        if self.prompt is not None:
            _check_prompt(self.prompt)
        if self.seed is not None and self.count is None:
            raise ValueError(f"seed={self.seed} draws count rows: give count, or drop seed")
        return self


class ExampleConfig(Config):
    """A few-shot example: a question and its answer."""

    user: str = Field(min_length=1)
    assistant: str = Field(min_length=1)


class ProtocolConfig(Config):
    """How a benchmark asks its problems and scores the responses, as published.

    Args:
        version: increment it when the meaning of the same settings changes; part of the key of every result.
        prompt: a format string over the columns of a problem, such as `Question: {question}`; braces are
            written `{{` and `}}`.
        system: text of the system turn; without `chat`, text at the beginning of the prompt.
        examples: few-shot examples.
        chat: use the checkpoint's chat template; otherwise the prompt is plain text.
        examples_as: few-shot examples in a chat: `turns`, or `text` before the prompt in the same turn.
        separator: joins the parts of a plain-text prompt: system text, examples, prompt. The two texts of an
            example are concatenated without it.
        chat_template: file with a Jinja template, for checkpoints without a chat template.
        prefill: a format string over the columns: the start of the assistant's response, which the model
            continues.
        stops: the response is cut before the first occurrence of any of these texts, and decoding ends there
            (not with `stop_at_eos: false`).
        scorers: names from `dparallel.problems.scoring.SCORERS`; the first metric of the first scorer is the
            accuracy. The default for coins problems is `coins`.
        extra: columns passed to the scorers only, such as unit tests; of any JSON type.
    """

    version: PositiveInt = 1
    prompt: str = "{prompt}"
    system: str | None = Field(default=None, min_length=1)
    examples: tuple[ExampleConfig, ...] = ()
    chat: bool = False
    examples_as: Literal["turns", "text"] = "turns"
    separator: str = "\n\n"
    chat_template: LocalPath | None = None
    prefill: str = ""
    stops: tuple[str, ...] = ()
    scorers: tuple[str, ...] = Field(default=("exact",), min_length=1)
    extra: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> "ProtocolConfig":
        _check_prompt(self.prompt)
        ColumnText(self.prefill, "prefill")
        if self.chat_template is not None and not self.chat:
            raise ValueError(f"chat_template={self.chat_template!r} has no effect with chat=false")
        if self.examples_as == "text" and not (self.chat and self.examples):
            raise ValueError("examples_as='text' has no effect without chat=true and examples: drop it")
        if "" in self.stops:
            raise ValueError("stops holds an empty text, which would end every response: drop it")
        for name in ("stops", "scorers", "extra"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"{name}={list(given)} names something twice")
        return self


class ProblemsConfig(Config):
    """A set of problems and its protocol.

    Args:
        benchmark: `coins` generates problems from `split`, `count` and `seed`; `dataset` reads all `sources`
            in order.
        split, count, seed: of `coins`.
        sources: data sets of `dataset`.
        protocol: how problems are asked and responses are scored.
    """

    benchmark: Literal["coins", "dataset"]
    split: Literal["train", "distillation", "validation", "test"] = "train"
    count: PositiveInt | None = None
    seed: NonNegativeInt = 0
    sources: tuple[SourceConfig, ...] = ()
    protocol: ProtocolConfig = ProtocolConfig()

    def files(self) -> list[Path]:
        """All local files that determine these problems; changes to them change the stage key."""
        files = [file for source in self.sources for file in source.files()]
        template = self.protocol.chat_template
        return files if template is None else [*files, Path(template)]

    @field_validator("protocol")
    @classmethod
    def _scorers_of_benchmark(cls, protocol: ProtocolConfig, info: ValidationInfo) -> ProtocolConfig:
        if info.data.get("benchmark") == "coins" and "scorers" not in protocol.model_fields_set:
            return protocol.model_copy(update={"scorers": ("coins",)})
        return protocol

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
            return self
        if self.sources or self.count is None:
            raise ValueError(
                f"benchmark='coins' with count={self.count}, {len(self.sources)} sources: it is generated, "
                "so give count and no sources"
            )
        if self.count > COINS_LIMIT:
            raise ValueError(f"benchmark='coins' with count={self.count}: at most {COINS_LIMIT}; lower count")
        protocol = self.protocol
        if protocol.prompt != "{prompt}" or protocol.extra or ColumnText(protocol.prefill).columns:
            raise ValueError(
                "benchmark='coins' has no columns: drop protocol.prompt and protocol.extra, and write "
                "protocol.prefill without {}"
            )
        return self
