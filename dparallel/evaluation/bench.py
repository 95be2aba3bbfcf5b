"""Models and problems of a benchmark, and what still has to be decoded and judged."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import PreTrainedTokenizerBase

from dparallel.config.base import UserError, plain_message
from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import BenchmarkConfig
from dparallel.config.problems import ProtocolConfig
from dparallel.evaluation.cases import TEACHER, Case
from dparallel.evaluation.certainty import CertaintyMap, read_certainty, suited
from dparallel.evaluation.store import Store
from dparallel.models.checkpoints import load_tokenizer, read_config
from dparallel.problems.prompts import render_all
from dparallel.problems.registry import check_disjoint, load_problems, problems_digest, protocol_of
from dparallel.problems.scorer import Scorer
from dparallel.problems.scoring import check_scorable, scorer_named, scorers_of
from dparallel.problems.sources import Problem
from dparallel.stages.code import DECODING, PROMPTS, STOPS, code_digest, rule_digest, scorer_modules
from dparallel.stages.files import is_there
from dparallel.stages.manifest import StageError, digest, fingerprint

Split = Literal["validation", "test"]

SLICE_BATCHES, SLICE_PROBLEMS = 4, 64  # size of a slice: batches, or problems if batches are small
REPEAT = 1_000_003  # between the seeds of the responses to a problem that are judged together
SLICE_VERDICTS = 128  # problems of a slice of verdicts by a scorer that takes long
CERTAINTY_CODE = (*DECODING, "evaluation/certainty.py")


class Unit(BaseModel):
    """Work for a process on a slice of a split's problems and a model. Consists of JSON values.

    Attributes:
        model: name of an input.
        slice: index of the first problem, and index after the last one.
        kind: `samples` decodes and stores the slice; `certainty` records how certain the model is of every
            position while it decodes the first problem of the slice; `verdicts` judges the stored samples of
            the slice.
        scorer: name of the scorer, for verdicts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    split: Split
    decoding: DecodingConfig
    slice: tuple[int, int]
    kind: Literal["samples", "certainty", "verdicts"] = "samples"
    scorer: str | None = None

    @property
    def label(self) -> str:
        """A short description for messages."""
        setting = self.decoding.steps if self.decoding.threshold is None else f"{self.decoding.threshold:g}"
        decoded = f"{self.split}, {self.model}, {self.decoding.mode}, {self.decoding.rule} {setting}"
        where = f"problems {self.slice[0] + 1} to {self.slice[1]}"
        if self.kind == "certainty":
            return f"certainty of {decoded}"
        what = "" if self.scorer is None else f"verdicts of {self.scorer} on "
        return f"{what}{decoded}, {where}"


class Bench:
    """Resolves the names in a `Unit` to models and problems, and accesses the store of samples.

    Args:
        inputs: model folders by name.
        store: the store of samples and verdicts, or its folder.
    """

    def __init__(self, config: BenchmarkConfig, inputs: Mapping[str, str], store: str | Path | Store):
        self.config = config
        self.inputs = inputs
        self.store = store if isinstance(store, Store) else Store(store)
        self.begun = datetime.now(UTC)  # samples from before are reused ones of other runs
        self._prompts: dict[tuple[str, Split], list[list[int]]] = {}
        self._samples_keys: dict[tuple[str, Split, DecodingConfig], str] = {}

    @cached_property
    def problems(self) -> dict[Split, list[Problem]]:
        """Problems by split.

        Raises:
            ProblemsError: splits overlap, or a problem cannot be judged.
            StageError: files of problems changed since they were first measured.
        """
        for files in self._files():
            self.store.check_unchanged(files)
        problems = {split: load_problems(config) for split, config in self.config.splits().items()}
        check_disjoint({f"benchmark.{split}": of_split for split, of_split in problems.items()})
        for split, of_split in problems.items():
            check_scorable(of_split, self.protocol(split))
        return problems

    def remember_files(self) -> None:
        """Note what the files of the problems hold, before the first sample is decoded."""
        for files in self._files():
            self.store.remember(files)

    def _files(self) -> list[list[Path]]:
        """Files of the problems by split."""
        splits = self.config.splits().values()
        return [config.files() for config in splits]

    @property
    def content(self) -> str:
        """Digest of the problems of all splits."""
        return problems_digest([*self.problems.get("validation", []), *self.problems["test"]], extra=True)

    @property
    def judges(self) -> str:
        """Digest of everything that determines verdicts on given responses."""
        names = dict.fromkeys(name for split in self.problems for name in self.protocol(split).scorers)
        return digest([[scorer_named(name).identity(), code_digest(scorer_modules(name))] for name in names])

    def protocol(self, split: Split) -> ProtocolConfig:
        """How a split's problems are asked and judged."""
        return protocol_of(self.config.splits()[split])

    def tokenizer(self, model: str) -> PreTrainedTokenizerBase:
        """The tokenizer of an input."""
        return load_tokenizer(self.inputs[model])

    def prompts(self, model: str, split: Split) -> list[list[int]]:
        """Prompt token ids of a split's problems for a model."""
        if (model, split) not in self._prompts:
            tokenizer = self.tokenizer(model)
            self._prompts[model, split] = render_all(self.problems[split], self.protocol(split), tokenizer)
        return self._prompts[model, split]

    def samples_key(self, model: str, split: Split, decoding: DecodingConfig) -> str:
        """Key of samples: a digest of the model, the prompts, the decoding and the decoding code."""
        asked = (model, split, decoding)
        if asked not in self._samples_keys:
            prompts = self.prompts(model, split)
            self._samples_keys[asked] = self._key(model, split, prompts, decoding, DECODING)
        return self._samples_keys[asked]

    def repeated(self, split: Split, decoding: DecodingConfig) -> list[DecodingConfig]:
        """The decodings of all responses to a problem that a scorer judges together: the first one is given.

        Sampled ones have other seeds. Without a temperature, all would be equal, and there is one.
        """
        count = responses_to_each(self.protocol(split), decoding)
        seeds = [((decoding.seed or 0) + number * REPEAT) % 2**63 for number in range(1, count)]
        return [decoding, *(decoding.model_copy(update={"seed": seed}) for seed in seeds)]

    def copies(self, split: Split, decoding: DecodingConfig) -> str | None:
        """What to know where one response counts as several, which would be equal."""
        count = max(scorer.repeats for scorer in scorers_of(self.protocol(split)))
        if count == 1 or decoding.temperature > 0:
            return None
        return (
            f"{count} responses to every problem are judged together; without a temperature all are equal, "
            "so one is decoded and counts as all of them"
        )

    def verdicts_key(self, model: str, split: Split, decoding: DecodingConfig, scorer: str) -> str:
        """Key of verdicts: a digest of responses, problems, and the code that ends and judges responses."""
        problems, protocol, judge = self.problems[split], self.protocol(split), scorer_named(scorer)
        judged = self.repeated(split, decoding)[: judge.repeats]
        samples = "+".join(self.samples_key(model, split, repeat) for repeat in judged)
        return verdicts_key(samples, problems, protocol, judge)

    def count_reused(self, samples: pa.Table) -> int:
        """Number of samples that were decoded before this run, or before the stage that it resumes, began."""
        moments = samples["measured_at"].to_pylist()
        return sum(moment is None or moment < self.begun for moment in moments)

    def certainty_key(self, unit: Unit) -> str:
        """Key of a certainty map: a digest of model, prompt, decoding and code."""
        prompt = self.prompts(unit.model, unit.split)[unit.slice[0]]
        return self._key(unit.model, unit.split, [prompt], unit.decoding, CERTAINTY_CODE)

    def missing(self, cases: Iterable[Case], split: Split) -> list[Unit]:
        """Units for samples of these cases that are not stored; methods may share a decoding."""
        units: dict[Unit, None] = {}
        for model, decoding in self._decodings(cases, split):
            rows = set(self.store.samples(self.samples_key(model, split, decoding))["row"].to_pylist())
            for part in slices(len(self.problems[split]), self.config.batch_size, decoding):
                if not rows.issuperset(part):
                    units[
                        Unit(model=model, split=split, decoding=decoding, slice=(part.start, part.stop))
                    ] = None
        return list(units)

    def _decodings(self, cases: Iterable[Case], split: Split) -> list[tuple[str, DecodingConfig]]:
        """Models and decodings of all samples of cases."""
        every = ((case.model, repeat) for case in cases for repeat in self.repeated(split, case.decoding))
        return list(dict.fromkeys(every))

    def unjudged(self, cases: Iterable[Case], split: Split) -> list[Unit]:
        """Units for verdicts on samples of these cases that are not stored."""
        units: dict[Unit, None] = {}
        total = len(self.problems[split])
        for model, decoding in dict.fromkeys((case.model, case.decoding) for case in cases):
            for scorer in scorers_of(self.protocol(split)):
                key = self.verdicts_key(model, split, decoding, scorer.name)
                for part in judged_slices(total, scorer):
                    if not self.store.has_verdicts(key, part):
                        units[
                            Unit(
                                model=model,
                                split=split,
                                decoding=decoding,
                                slice=(part.start, part.stop),
                                kind="verdicts",
                                scorer=scorer.name,
                            )
                        ] = None
        return list(units)

    def samples(self, key: str, split: Split) -> pa.Table:
        """Samples of all problems of a split; StageError if some are missing."""
        samples, total = self.store.samples(key), len(self.problems[split])
        if len(samples) < total:
            raise StageError(
                f"{self.store.folder}: {total - len(samples)} of {total} samples {key} are missing although "
                "they were decoded; run the stage again"
            )
        return samples

    def certainty_unit(self, model: str, decoding: DecodingConfig) -> Unit:
        """The unit that records certainty on the first validation problem, or else test problem.

        A model that cannot be decoded so is decoded in a mode that suits it. A teacher that states no
        attention pattern has full attention, as in training.
        """
        split: Split = "validation" if "validation" in self.problems else "test"
        pattern = read_config(self.inputs[model]).attention_pattern
        decoding = suited(decoding, pattern or ("full" if model == TEACHER else None))
        return Unit(model=model, split=split, decoding=decoding, slice=(0, 1), kind="certainty")

    def certainty(self, unit: Unit) -> CertaintyMap:
        """Result of a certainty unit, labelled with kind and name of its model."""
        label = unit.model.replace("/", ", ")
        return read_certainty(self.store.certainty(self.certainty_key(unit)), label)

    def is_missing(self, unit: Unit) -> bool:
        """Whether the result of a unit is not stored yet."""
        if unit.kind == "certainty":
            return not is_there(self.store.certainty(self.certainty_key(unit)))
        if unit.scorer is not None:
            verdicts = self.verdicts_key(unit.model, unit.split, unit.decoding, unit.scorer)
            return not self.store.has_verdicts(verdicts, range(*unit.slice))
        key = self.samples_key(unit.model, unit.split, unit.decoding)
        return not self.store.has_samples(key, range(*unit.slice))

    def decoded_file(self, unit: Unit) -> Path:
        """The file that decoding a unit makes."""
        if unit.kind == "certainty":
            return self.store.certainty(self.certainty_key(unit))
        key = self.samples_key(unit.model, unit.split, unit.decoding)
        return self.store.samples_file(key, range(*unit.slice))

    def units(self, values: Iterable[Mapping[str, Any]]) -> list[Unit]:
        """Parse units from JSON values; UserError for a unit that does not fit these settings and inputs."""
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
            known = self.protocol(unit.split).scorers if unit.kind == "verdicts" else (None,)
            if unit.scorer not in known:
                raise UserError(
                    f"unit of kind {unit.kind!r} and scorer {unit.scorer!r}; the scorers of its protocol are "
                    f"{', '.join(self.protocol(unit.split).scorers)}, and only verdicts have one"
                )
            units.append(unit)
        return units

    def stops(self, split: Split) -> tuple[str, ...]:
        """Stop texts of a split's protocol, at which decoding ends."""
        return self.protocol(split).stops

    def _key(
        self,
        model: str,
        split: Split,
        prompts: Sequence[list[int]],
        decoding: DecodingConfig,
        code: Sequence[str],
    ) -> str:
        ending: dict[str, Any] = {}  # empty for most, so that their keys stay what they were
        if decoding.stop_at_eos and self.stops(split):  # otherwise stop texts do not affect decoding
            ending, code = {"stops": self.stops(split)}, (*code, *STOPS)
        if (own := rule_digest(decoding.rule)) is not None:
            ending["rule"] = own
        made_from = {
            "model": fingerprint(self.inputs[model]),
            "prompts": prompts,
            "decoding": decoding.model_dump(mode="json"),
            "code": code_digest(code),
            **ending,
        }
        return digest(made_from)[:16]


def responses_to_each(protocol: ProtocolConfig, decoding: DecodingConfig) -> int:
    """Number of responses that are decoded to every problem; without a temperature, all would be equal."""
    if decoding.temperature == 0:
        return 1
    return max(scorer.repeats for scorer in scorers_of(protocol))


def slices(total: int, batch_size: int, decoding: DecodingConfig) -> list[range]:
    """Divide problems into slices of about equal size; each is decoded and stored as a whole.

    With a compiled decoding there is a single slice: shapes depend on the longest prompt of a slice, and
    further shapes would be compiled.
    """
    count = -(-total // max(SLICE_BATCHES * batch_size, SLICE_PROBLEMS))
    return _divided(total, 1 if decoding.compile else count)


def judged_slices(total: int, scorer: Scorer) -> list[range]:
    """Divide samples into slices that are judged and stored as a whole; fast scorers have a single one."""
    return _divided(total, 1 if scorer.in_process else -(-total // SLICE_VERDICTS))


def verdicts_key(
    samples_key: str, problems: Sequence[Problem], protocol: ProtocolConfig, scorer: Scorer
) -> str:
    """Names verdicts by what they follow from: responses, problems, the code that ends and judges them."""
    made_from = {
        "samples": samples_key,
        "problems": problems_digest(problems, extra=True),
        "protocol": protocol.version,
        "stops": protocol.stops,
        "scorer": scorer.identity(),
        "code": code_digest({*PROMPTS, *scorer_modules(scorer.name)}),
    }
    return digest(made_from)[:16]


def _divided(total: int, count: int) -> list[range]:
    return [range(total * index // count, total * (index + 1) // count) for index in range(count)]
