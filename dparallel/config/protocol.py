"""Settings of protocols: how the problems of a benchmark are read, asked and scored."""

import os
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from dparallel.config.base import HOW, Config
from dparallel.config.decoding import DecodingConfig
from dparallel.config.paths import BelowFolder, InputPath
from dparallel.config.sources import PROBLEM_FILES, ColumnText, SourceConfig, check_prompt

ROWS = r"^\[-?\d*%?:-?\d*%?\]$"  # a slice such as [:200] or [50%:]


class ExampleConfig(Config):
    """A few-shot example: a question and its answer."""

    user: str = Field(min_length=1)
    assistant: str = Field(min_length=1)


class FileConfig(Config):
    """A data set as a single file, where it differs from the data set on the Hub.

    Args:
        names: names of the file, by which it is found in a folder.
        url: where it is published.
        rows: the rows of the Hub data set's split in the file, such as `[10:510]`; by default all.
        columns: as `SourceConfig.columns`.
    """

    names: tuple[BelowFolder, ...] = ()
    url: Annotated[str | None, HOW] = Field(default=None, min_length=1)
    rows: str = Field("", pattern=rf"{ROWS}|^$")
    columns: dict[str, str] = {}


class ProtocolConfig(Config):
    """How a benchmark asks its problems and scores the responses, as published.

    Args:
        version: increment it when the meaning of the same settings changes; part of the key of every verdict,
            while samples are keyed by what is asked.
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
            continues; scorers judge it together with the response.
        stops: the response is cut before the first occurrence of any of these texts, and decoding ends there
            (not with `stop_at_eos: false`).
        scorers: names from `dparallel.problems.scoring.SCORERS`; the first metric of the first scorer is the
            accuracy. The default for an embedded task is its own scorer.
        extra: columns passed to the scorers only, such as unit tests; of any JSON type.
        data: the published data set on the Hub, in one or more parts; read where `ProblemsConfig` names no
            sources of its own.
        problems: number of problems of the published data set; a copy with another number is warned about.
        file: the same data set as a single file.
        licence: licence and source of the data.
        decoding: how the published numbers were decoded; a default, not part of what is asked.
    """

    file_kind: ClassVar[str] = (
        "a protocol: give it to `dparallel eval --protocol`, or as `test: {protocol: FILE, …}` of a benchmark"
    )

    version: PositiveInt = 1
    prompt: str = "{prompt}"
    system: str | None = Field(default=None, min_length=1)
    examples: tuple[ExampleConfig, ...] = ()
    chat: bool = False
    examples_as: Literal["turns", "text"] = "turns"
    separator: str = "\n\n"
    chat_template: Annotated[InputPath | None, HOW] = None  # its content is part of the data
    prefill: str = ""
    stops: tuple[str, ...] = ()
    scorers: tuple[str, ...] = Field(default=("exact",), min_length=1)
    extra: tuple[str, ...] = ()
    data: tuple[SourceConfig, ...] = ()
    problems: Annotated[PositiveInt | None, HOW] = None
    file: FileConfig = FileConfig()
    licence: Annotated[str | None, HOW] = Field(default=None, min_length=1)
    decoding: Annotated[DecodingConfig | None, HOW] = None

    def data_at(self, path: str | None) -> list[tuple[SourceConfig, SourceConfig]]:
        """The parts of the data as pairs: where they are read, and the published source that names them.

        Args:
            path: a local copy: a file, a pattern, a folder with a file of `file.names`, or a folder laid out
                as the data set on the Hub; None for the Hub.
        """
        if path is None:
            return [(part, part) for part in self.data]
        if os.path.isdir(path):
            named = [Path(path) / name for name in self.file.names]
            found = next((file for file in named if file.is_file()), None)
            if found is None:
                return [(self._in_folder(part, path), part) for part in self.data]
            path = str(found)
        changes = {
            "path": path,
            "subset": None,
            "split": f"train{self.file.rows}",
            "revision": None,
            "columns": self.file.columns,
        }
        first, *others = self.data
        return [
            (first.model_copy(update=changes), first.model_copy(update={"subset": None}) if others else first)
        ]

    def _in_folder(self, part: SourceConfig, path: str) -> SourceConfig:
        """A part of the data in a copy of any layout, whose subset may be a folder or a file.

        A copy of the Hub's folder, `SUBSET/test.parquet`; `test/SUBSET/` or, in a folder `test`, `SUBSET/`
        with files of any names; a file `SUBSET.jsonl`; or a folder with the files of the only part.
        """
        root, split = Path(path), part.split.partition("[")[0]
        local = part.model_copy(update={"path": path, "revision": None})
        if part.subset is None:
            return local
        folders = [root / split / part.subset, *([root / part.subset] if root.name == split else [])]
        folder = next(filter(Path.is_dir, folders), None)
        if folder is None and not (root / part.subset).is_dir():
            named = [root / f"{part.subset}{kind}" for kind in PROBLEM_FILES]
            folder = next(filter(Path.is_file, named), None)
        if folder is not None:
            slice_ = part.split.removeprefix(split)
            return local.model_copy(update={"path": str(folder), "subset": None, "split": f"train{slice_}"})
        whole = len(self.data) > 1 or (root / "README.md").is_file()
        return local if whole or (root / part.subset).is_dir() else local.model_copy(update={"subset": None})

    @model_validator(mode="after")
    def _consistent(self) -> "ProtocolConfig":
        check_prompt(self.prompt)
        ColumnText(self.prefill, "prefill")
        if self.chat_template is not None and not self.chat:
            raise ValueError(f"chat_template={self.chat_template!r} has no effect with chat=false")
        if self.examples_as == "text" and not self.chat:
            raise ValueError("examples_as='text' has no effect without chat=true: drop it")
        if "" in self.stops:
            raise ValueError("stops holds an empty text, which would end every response: drop it")
        for name in ("stops", "scorers", "extra"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"{name}={list(given)} names something twice")
        if self.file != FileConfig() and not self.data:
            raise ValueError("file says how a copy of data differs from it: give data, or drop file")
        return self
