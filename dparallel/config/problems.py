"""The settings of problems: where they come from, how they are asked, and how a response is judged."""

from collections.abc import Mapping
from glob import glob
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationInfo, field_validator, model_validator

from dparallel.config.base import Config, LocalPath

PROBLEM_FILES = (".jsonl", ".json", ".parquet")
COINS_LIMIT = 100_000  # drawing distinct problems takes up to 0.1 ms each, and every split holds millions


class ColumnText(Formatter):
    """A format string over columns. A column is the whole text between the braces: `{q.text}` is `q.text`.

    Attributes:
        columns: the columns it names.
    """

    def __init__(self, text: str, setting: str = "prompt"):
        """Raise a ValueError that names the `setting` for what is no format string."""
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
        if not self.plain:
            return self.vformat(self.text, (), texts)
        return "".join(
            literal if column is None else literal + texts[column] for literal, column in self.parts
        )

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[str, str]:
        return kwargs[field_name], field_name


class _Recorder(dict[str, str]):
    """Has every column, as an empty text, and notes which were asked for."""

    def __init__(self, found: dict[str, str]):
        self.found = found

    def __missing__(self, column: str) -> str:
        return self.found.setdefault(column, "")


def _check_prompt(prompt: str) -> None:
    if not ColumnText(prompt).columns:
        raise ValueError(f"prompt={prompt!r} must name the columns it is made of, as {{question}}")


def _matters(file: Path, folder: Path) -> bool:
    """Whether a file may be read as problems; README.md may say which files are."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and (file.suffix in PROBLEM_FILES or file.name == "README.md")


class SourceConfig(Config):
    """One data set: files, a folder, or a name on the hub.

    Args:
        path: a JSONL, JSON or Parquet file (or a pattern such as `data/*.parquet`), a folder of files of one
            of these kinds, sub-folders included, or a name on the hub such as `openai/gsm8k`.
        subset: of a hub data set, or of a folder: a subset that its dataset card (README.md) names, or a
            sub-folder.
        split: of a hub data set or a folder, whose files belong to the split that the card or their names
            say (`test.jsonl`, `test/a.jsonl`), `train` where no name says one. It may be sliced,
            `train[:500]`; of a file only the slice matters. Problems without an id are named by their row
            in the whole split, the same in every slice.
        revision: of a hub data set.
        prompt: a format string over this source's columns, in place of the protocol's.
        reference, id: columns; None takes the columns of these names where there are any.
        count: how many rows; the first ones, or drawn by `seed`.
    """

    path: LocalPath
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    prompt: str | None = None
    reference: str | None = None
    id: str | None = None
    count: PositiveInt | None = None
    seed: NonNegativeInt | None = None

    @property
    def label(self) -> str:
        """Its name in messages and records."""
        part = [self.subset, None if self.split == "train" else self.split]
        return " ".join([self.path, *filter(None, part)])

    def files(self) -> list[Path]:
        """Its files on this machine; none of a name on the hub."""
        path = Path(self.path)
        if path.is_file():  # its name may look like a pattern
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
    """A question and its answer, shown before the problem that is asked."""

    user: str = Field(min_length=1)
    assistant: str = Field(min_length=1)


class ProtocolConfig(Config):
    """How problems are asked and how responses are judged; a benchmark's protocol, as published.

    Args:
        version: raised when the same keys come to mean something else; part of the key of every result.
        prompt: a format string over the columns of a problem, `Question: {question}`; write `{{` for a
            brace.
        system: text of a system turn; without `chat`, a text in front of everything else.
        examples: few-shot examples.
        chat: ask in the checkpoint's chat template; otherwise the prompt is plain text.
        examples_as: of examples within a chat: `turns`, or `text` in front of the prompt in the same turn.
        separator: stands between the parts of a plain text: system text, examples, prompt. An example is
            its two texts one directly after the other.
        chat_template: file of a Jinja template, for a checkpoint that has none.
        prefill: a format string over the columns: the beginning of the assistant's response, which the
            model goes on from.
        stops: a response ends before the first of these texts.
        scorers: how responses are judged, by names of `dparallel.problems.scoring.SCORERS`; the first
            metric of the first scorer is the accuracy. Coins problems are judged by `coins` by default.
        extra: columns that only a scorer reads, such as tests; of any JSON type.
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
    """Which problems, how they are asked, and how a response is judged.

    Args:
        benchmark: `coins` is generated, from `split`, `count` and `seed`; `dataset` reads `sources`, one
            after another.
        protocol: how they are asked and judged.
    """

    benchmark: Literal["coins", "dataset"]
    split: Literal["train", "distillation", "validation", "test"] = "train"
    count: PositiveInt | None = None
    seed: NonNegativeInt = 0
    sources: tuple[SourceConfig, ...] = ()
    protocol: ProtocolConfig = ProtocolConfig()

    def files(self) -> list[Path]:
        """Every file of this machine that these problems are made from, so that a change can be seen."""
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
