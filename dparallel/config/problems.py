"""Settings of problems: where they come from, and their protocol."""

from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationInfo, field_validator, model_validator

from dparallel.config.base import Config
from dparallel.config.paths import InputPath
from dparallel.config.protocol import ROWS, ProtocolConfig
from dparallel.config.sources import PROBLEM_FILES, ColumnText, SourceConfig

__all__ = [
    "PROBLEM_FILES",
    "ColumnText",
    "ProblemsConfig",
    "ProtocolConfig",
    "SourceConfig",
]  # re-exported: all settings of problems are imported from here

LM_EVAL = "lm_eval"  # benchmark, and the scorers of its tasks
FROM_TASK = ("prompt", "examples", "prefill", "stops", "scorers", "extra", "data", "file", "separator")
Embedded = Literal["coins", "ledger"]  # the embedded tasks, by their modules in `problems/`
EMBEDDED: tuple[str, ...] = get_args(Embedded)
GENERATED_LIMIT = 100_000  # drawing a distinct problem takes up to 0.1 ms; each split has millions of them


class ProblemsConfig(Config):
    """A set of problems and its protocol.

    Args:
        benchmark: an embedded task, such as `coins`, generates problems from `split`, `count` and `seed`.
            `dataset` reads all `sources` in order, or, without sources, the data that the protocol names.
            `lm_eval` takes a task of lm-eval that generates text: its prompts, stops, filters and metrics.
        split: of an embedded task.
        rows: slice of all problems of a `dataset`, such as `[:200]` or `[200:]`.
        count, seed: of an embedded task; of a `dataset`, the number of problems: the first ones of these
            rows, or a random selection if `seed` is given.
        path: local copy of the protocol's data, read instead of the Hub: a file, or a folder.
        sources: data sets of `dataset`.
        task: name of a task of `lm_eval`, such as `gsm8k_cot_zeroshot`.
        metric: metric of the task used as the accuracy, such as `exact_match,flexible-extract`; by default
            the first one that can be it.
        num_fewshot: number of examples; by default the task's own. They are drawn as lm-eval draws them.
        data_files: local files by split, read instead of the task's data set on the Hub.
        protocol: how problems are asked and responses are scored; of `lm_eval`, whether in a chat.
    """

    benchmark: Literal[Embedded, "dataset", "lm_eval"]
    split: Literal["train", "distillation", "validation", "test"] = "train"
    count: PositiveInt | None = None
    seed: NonNegativeInt | None = None
    rows: str | None = Field(default=None, pattern=ROWS)
    path: InputPath | None = None
    sources: tuple[SourceConfig, ...] = ()
    task: str | None = Field(default=None, pattern=r"^[^:\s]+$")
    metric: str | None = Field(default=None, min_length=1)
    num_fewshot: NonNegativeInt | None = None
    data_files: dict[str, InputPath] = {}
    protocol: ProtocolConfig = ProtocolConfig()

    def reads(self) -> list[tuple[SourceConfig, SourceConfig]]:
        """Where a `dataset` is read, as pairs: a source, and the source whose name its problems carry."""
        if self.sources:
            return [(source, source) for source in self.sources]
        return self.protocol.data_at(self.path) if self.benchmark == "dataset" else []

    def files(self) -> list[Path]:
        """All local files that determine these problems; changes to them change the stage key."""
        files = [file for source, _ in self.reads() for file in source.files()]
        files += filter(Path.is_file, map(Path, self.data_files.values()))
        template = self.protocol.chat_template
        return files if template is None else [*files, Path(template)]

    def how_names(self) -> set[str]:
        """Where local files lie does not matter; their content is part of the stage key."""
        return super().how_names() | {"path", "data_files"}

    @field_validator("protocol")
    @classmethod
    def _scorers_of_benchmark(cls, protocol: ProtocolConfig, info: ValidationInfo) -> ProtocolConfig:
        task = info.data.get("benchmark")
        if task in EMBEDDED and "scorers" not in protocol.model_fields_set:
            return protocol.model_copy(update={"scorers": (task,)})
        if task == LM_EVAL:
            scorer = ":".join(filter(None, [LM_EVAL, info.data.get("task"), info.data.get("metric")]))
            # Values that change nothing are accepted, since a dump of these settings has all of them.
            accepted = (ProtocolConfig(), ProtocolConfig(scorers=(scorer,)))
            given = [
                name
                for name in FROM_TASK
                if getattr(protocol, name) not in [getattr(settings, name) for settings in accepted]
            ]
            if given:
                raise ValueError(
                    f"{', '.join(given)}: with benchmark='lm_eval', the task gives them; drop them"
                )
            return protocol.model_copy(update={"scorers": (scorer,)})
        return protocol

    @model_validator(mode="after")
    def _consistent(self) -> "ProblemsConfig":
        check = {
            **dict.fromkeys(EMBEDDED, self._misfit_of_generated),
            "dataset": self._misfit_of_data,
            LM_EVAL: self._misfit_of_task,
        }
        problem = self._misfit_of_others() or check[self.benchmark]()
        if problem is not None:
            raise ValueError(f"benchmark={self.benchmark!r} {problem}")
        if self.benchmark in EMBEDDED and self.seed is None:
            self.__dict__["seed"] = 0  # during construction, before the object is frozen
        return self

    def _misfit_of_others(self) -> str | None:
        """Settings of another benchmark."""
        given = [name for name in ("task", "metric", "num_fewshot", "data_files") if getattr(self, name)]
        if given and self.benchmark != LM_EVAL:
            return f"with {', '.join(given)}: they belong to benchmark='lm_eval'; drop them"
        if self.seed is not None and self.count is None:
            return f"with seed={self.seed}: it draws count problems; give count, or drop seed"
        return None

    def _misfit_of_task(self) -> str | None:
        if self.task is None:
            return "needs task: the name of a task of lm-eval, such as gsm8k_cot_zeroshot"
        if self.sources or self.path is not None or self.split != "train":
            return "with sources, path or split: the task names its data; give local files as data_files"
        return None

    def _misfit_of_data(self) -> str | None:
        if self.split != "train":
            return f"with split={self.split!r}: splits belong to its sources, as sources[0].split"
        if self.sources and self.path is not None:
            return f"with path={self.path!r} and sources: path replaces the data of the protocol; drop one"
        if not self.sources and not self.protocol.data and self.path is not None:
            return (
                f"with path={self.path!r}: the protocol's data must say which columns are read; add "
                f"data: [{{path: {self.path}, reference: COLUMN}}] to the protocol, or give sources instead"
            )
        if not self.sources and not self.protocol.data:
            return "needs sources (a list of data sets, each with its path), or a protocol with data"
        return None

    def _misfit_of_generated(self) -> str | None:
        if self.sources or self.count is None:
            return (
                f"with count={self.count}, {len(self.sources)} sources: it is generated, so give count and "
                "no sources"
            )
        if self.path is not None or self.rows is not None:
            return f"with path={self.path!r}, rows={self.rows!r}: it is generated; drop them"
        if self.count > GENERATED_LIMIT:
            return f"with count={self.count}: at most {GENERATED_LIMIT}; lower count"
        protocol = self.protocol
        columns = protocol.prompt != "{prompt}" or protocol.extra or ColumnText(protocol.prefill).columns
        if columns or protocol.data:
            return (
                "has no columns: drop protocol.prompt, protocol.data and protocol.extra, and write "
                "protocol.prefill without {}"
            )
        return None
