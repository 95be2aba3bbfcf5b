"""The models and problems of a benchmark, and which of their samples are still to be decoded."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import PreTrainedTokenizerBase

from dparallel.config.base import UserError, plain_message
from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import BenchmarkConfig
from dparallel.config.problems import ProblemsConfig
from dparallel.evaluation.cases import Case
from dparallel.evaluation.certainty import CertaintyMap, read_certainty
from dparallel.evaluation.store import Store
from dparallel.models.checkpoints import load_tokenizer
from dparallel.problems.prompts import render_all
from dparallel.problems.registry import check_disjoint, load_problems, problems_digest
from dparallel.problems.scoring import check_scorable
from dparallel.problems.sources import Problem
from dparallel.stages.code import DECODING, code_digest
from dparallel.stages.manifest import StageError, digest, fingerprint

Split = Literal["validation", "test"]

SLICE_BATCHES, SLICE_PROBLEMS = 4, 64  # a slice is so many batches, and of small ones so many problems
CERTAINTY_CODE = (*DECODING, "evaluation/certainty.py")


class Unit(BaseModel):
    """Work for one process: decode some problems of a split with one model. Plain JSON.

    Attributes:
        model: name of an input.
        slice: the first problem, and the one after the last.
        kind: `samples` are kept slice by slice; `certainty` is how sure the model is of each position while
            it decodes the first problem of the slice.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    split: Split
    decoding: DecodingConfig
    slice: tuple[int, int]
    kind: Literal["samples", "certainty"] = "samples"

    @property
    def label(self) -> str:
        """In messages: a decoding in a few words."""
        setting = self.decoding.steps if self.decoding.threshold is None else f"{self.decoding.threshold:g}"
        decoded = f"{self.split}, {self.model}, {self.decoding.mode}, {self.decoding.rule} {setting}"
        where = f"problems {self.slice[0] + 1} to {self.slice[1]}"
        return f"{decoded}, {where}" if self.kind == "samples" else f"certainty of {decoded}"


class Bench:
    """What the names in a `Unit` stand for, and the store of its samples.

    Args:
        inputs: folders of models by name.
        store: folder of the store.
    """

    def __init__(self, config: BenchmarkConfig, inputs: Mapping[str, str], store: str | Path):
        self.config = config
        self.inputs = inputs
        self.store = Store(store)
        self._prompts: dict[tuple[str, Split], list[list[int]]] = {}

    @cached_property
    def problems(self) -> dict[Split, list[Problem]]:
        """Raise a ProblemsError for splits that overlap, or a problem that cannot be judged."""
        splits: dict[Split, ProblemsConfig] = {"validation": self.config.validation, "test": self.config.test}
        problems = {split: load_problems(config) for split, config in splits.items()}
        check_disjoint({f"benchmark.{split}": of_split for split, of_split in problems.items()})
        for split, of_split in problems.items():
            check_scorable(of_split, splits[split].protocol)
        return problems

    @property
    def content(self) -> str:
        """Digest of all problems."""
        return problems_digest([*self.problems["validation"], *self.problems["test"]])

    def tokenizer(self, model: str) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.inputs[model])

    def prompts(self, model: str, split: Split) -> list[list[int]]:
        """Token ids of every problem as this model is asked."""
        if (model, split) not in self._prompts:
            protocol = getattr(self.config, split).protocol
            self._prompts[model, split] = render_all(self.problems[split], protocol, self.tokenizer(model))
        return self._prompts[model, split]

    def samples_key(self, model: str, split: Split, decoding: DecodingConfig) -> str:
        """Names samples by what they are made from: model, prompts, decoding and the code that decodes."""
        return self._key(model, self.prompts(model, split), decoding, DECODING)

    def certainty_key(self, unit: Unit) -> str:
        prompt = self.prompts(unit.model, unit.split)[unit.slice[0]]
        return self._key(unit.model, [prompt], unit.decoding, CERTAINTY_CODE)

    def missing(self, cases: Iterable[Case], split: Split) -> list[Unit]:
        """The units of these cases whose samples are not in the store; methods may share a decoding."""
        units: dict[Unit, None] = {}
        for model, decoding in dict.fromkeys((case.model, case.decoding) for case in cases):
            rows = set(self.store.samples(self.samples_key(model, split, decoding))["row"].to_pylist())
            for part in slices(len(self.problems[split]), self.config.batch_size, decoding):
                if not rows.issuperset(part):
                    units[
                        Unit(model=model, split=split, decoding=decoding, slice=(part.start, part.stop))
                    ] = None
        return list(units)

    def samples(self, key: str, split: Split) -> pa.Table:
        """The samples of all problems of a split; `StageError` where some are gone."""
        samples, total = self.store.samples(key), len(self.problems[split])
        if len(samples) < total:
            raise StageError(
                f"{self.store.folder}: {total - len(samples)} of {total} samples {key} are gone though they "
                "were decoded; run the stage again"
            )
        return samples

    def certainty_unit(self, model: str, decoding: DecodingConfig) -> Unit:
        """How sure a model is of the first validation problem."""
        return Unit(model=model, split="validation", decoding=decoding, slice=(0, 1), kind="certainty")

    def certainty(self, unit: Unit) -> CertaintyMap:
        """What a certainty unit found, labelled with the kind and name of its model."""
        label = unit.model.replace("/", ", ")
        return read_certainty(self.store.certainty(self.certainty_key(unit)), label)

    def is_missing(self, unit: Unit) -> bool:
        if unit.kind == "certainty":
            return not self.store.certainty(self.certainty_key(unit)).is_file()
        key = self.samples_key(unit.model, unit.split, unit.decoding)
        return not self.store.has_samples(key, range(*unit.slice))

    def units(self, values: Iterable[Mapping[str, Any]]) -> list[Unit]:
        """Units from JSON values; a UserError for one that these settings and inputs do not have."""
        units = []
        for value in values:
            try:
                unit = Unit.model_validate(value)
            except ValidationError as error:
                raise UserError(f"{dict(value)} is no unit: {plain_message(error.errors()[0])}") from error
            if unit.model not in self.inputs:
                raise UserError(f"unit of model {unit.model!r}; the models are {', '.join(self.inputs)}")
            total = len(self.problems[unit.split])
            if not 0 <= unit.slice[0] < unit.slice[1] <= total:
                raise UserError(
                    f"unit of slice {list(unit.slice)}; the {total} {unit.split} problems have slices from "
                    f"[0, 1] to [{total - 1}, {total}]"
                )
            units.append(unit)
        return units

    def _key(
        self, model: str, prompts: Sequence[list[int]], decoding: DecodingConfig, code: Sequence[str]
    ) -> str:
        made_from = {
            "model": fingerprint(self.inputs[model]),
            "prompts": prompts,
            "decoding": decoding.model_dump(mode="json"),
            "code": code_digest(code),
        }
        return digest(made_from)[:16]


def slices(total: int, batch_size: int, decoding: DecodingConfig) -> list[range]:
    """Problems in slices as even as can be, each decoded at one go and kept once it is.

    A compiled decoding is not cut: the longest prompt of a slice is part of the shapes it compiles.
    """
    count = -(-total // max(SLICE_BATCHES * batch_size, SLICE_PROBLEMS))
    if decoding.compile:
        count = 1
    return [range(total * index // count, total * (index + 1) // count) for index in range(count)]
