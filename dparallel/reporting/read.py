"""Read: the results of a finished benchmark stage, and the texts and verdicts behind them in the store."""

import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from dparallel.config.base import plain_message
from dparallel.config.experiment import MEASUREMENTS
from dparallel.evaluation.measure import Measurement
from dparallel.evaluation.selection import Row
from dparallel.evaluation.store import Keys, Store
from dparallel.stages.manifest import MANIFEST, Manifest, StageError, read_manifest

RESULTS = "results.json"
ROW = TypeAdapter(Row)
WHERE = ("runs=", "store=")  # overrides that results do not depend on
TEXTS = ("problem_id", "prompt", "reference", "response")
ProblemKey = tuple[str, str, int]  # id, prompt, and number of earlier problems that are equal in both


@dataclass(frozen=True)
class Answers:
    """The responses of a measurement, in the order of its problems.

    Attributes:
        metric: the metric of `verdicts`, which the accuracy is the share of.
        problem_ids, prompts, references, responses: texts; a reference may be missing.
        verdicts: whether each response is correct, or its value as a share of the best one (0..1); None if
            unknown.
        notes: reasons of the verdicts, where there are any.
        pooled: whether the accuracy is a number of all responses together, so that there are no verdicts.
    """

    metric: str
    problem_ids: list[str]
    prompts: list[str]
    references: list[str | None]
    responses: list[str]
    verdicts: list[bool | float | None]
    notes: list[str | None]
    pooled: bool = False

    @cached_property
    def places(self) -> dict[ProblemKey, int]:
        """Index of every problem: problems are the same if their ids and their prompts are."""
        seen: Counter[tuple[str, str]] = Counter()
        places = {}
        for place, key in enumerate(zip(self.problem_ids, self.prompts, strict=True)):
            places[(*key, seen[key])] = place
            seen[key] += 1
        return places


@dataclass(frozen=True)
class Benchmark:
    """A finished benchmark stage.

    Attributes:
        name: of the benchmark.
        run: label of the run in a comparison of runs; empty in the report of one experiment.
        folder: the stage's folder.
        manifest: of the stage.
        rows: all rows; those of a split are in the order of the results.
        swept: (model, method) of all sweeps.
        sweep_split: the split on which whole sweeps were measured.
        reference: the reference on the test problems.
        best: operating point of the best student on the test problems.
        outcome: the headline as a sentence.
        store: samples and verdicts.
        models: folders of the models by name of the stage's input; missing ones are left out.
    """

    name: str
    run: str
    folder: Path
    manifest: Manifest
    rows: Sequence[Row]
    swept: frozenset[tuple[str, str]]
    sweep_split: str
    reference: Row
    best: Row
    outcome: str
    default_student: str | None
    store: Store
    models: Mapping[str, str] = field(default_factory=dict)
    _read: dict[Keys, Answers] = field(default_factory=dict, compare=False, repr=False)
    _samples: dict[str, pa.Table] = field(default_factory=dict, compare=False, repr=False)

    @property
    def reported(self) -> list[Row]:
        """The rows of tables: reference, fixed decodings, operating points, on the test problems."""
        return [
            row
            for row in self.rows
            if row.split == "test" and (row.operating_point or (row.model, row.method) not in self.swept)
        ]

    @property
    def selects(self) -> bool:
        """Whether thresholds were chosen, on validation problems."""
        return any(row.split == "validation" for row in self.rows)

    @property
    def max_loss(self) -> float:
        """Accepted loss of accuracy, 0..1."""
        return float(self.manifest.config.get("max_loss", 0.01))

    @property
    def metric(self) -> str:
        """The metric that is the accuracy."""
        return next(iter(self.reference.measurement.metrics))

    @property
    def judges(self) -> str | None:
        """Digest of everything that determines verdicts on given responses; None if it is not recorded."""
        return self.manifest.details.get("judges")

    @property
    def batch_sizes(self) -> list[int]:
        """Numbers of test problems that were decoded together."""
        rows = [row for row in self.rows if row.split == "test"]
        return sorted({size for row in rows for size in row.measurement.batch_sizes})

    @property
    def protocol(self) -> dict[str, Any]:
        """How the test problems are asked and judged."""
        protocol: dict[str, Any] = self.manifest.config["test"]["protocol"]
        return protocol

    @property
    def devices(self) -> list[str]:
        """Hardware of all rows on the test problems."""
        return sorted({row.measurement.hardware for row in self.rows if row.split == "test"})

    @property
    def started(self) -> str:
        """The config file and overrides that the run was started with, without where its results are kept."""
        origin = self.manifest.origin
        overrides = [each for each in origin.get("overrides", []) if not each.startswith(WHERE)]
        return shlex.join([origin.get("config") or "settings of a script", *overrides])

    @property
    def data(self) -> list[str]:
        """Where the problems of each split come from."""
        named: Mapping[str, Sequence[str]] = self.manifest.details.get("data", {})
        return [f"{split}: {'; '.join(sources)}" for split, sources in named.items()]

    def training(self) -> dict[str, dict[str, Any]]:
        """Settings of the students' training, by name of the stage's input; of those whose stage is there."""
        return {name: made.config for name, made in self.trainings().items()}

    def trainings(self) -> dict[str, Manifest]:
        """Manifests of the students' training, as in `training`."""
        found: dict[str, Manifest] = {}
        for name, folder in self.models.items():
            if (Path(folder) / MANIFEST).is_file():
                wanted = read_manifest(folder).inputs.get("training")
                made = _stage_of(Path(folder).resolve().parent, "training", wanted)
                found |= {} if made is None else {name: made}
        return found

    def trajectories(self, training: Manifest) -> Manifest | None:
        """Manifest of the trajectories that a student has learned from, if their stage is there."""
        return _stage_of(self.folder.resolve().parent, "trajectories", training.inputs.get("trajectories"))

    def answers(self, row: Row) -> Answers:
        """The texts and verdicts behind a row; StageError if they are missing or damaged."""
        assert row.keys is not None, "read_benchmark reads rows with their keys"
        if row.keys not in self._read:
            self._read[row.keys] = self._answers(row.keys.verdicts[0], row.measurement)
        return self._read[row.keys]

    def _answers(self, key: str, measured: Measurement) -> Answers:
        table = self.store.verdicts(key)
        if table is None or len(table) < measured.samples // measured.repeats:
            raise StageError(
                f"{self.store.folder} lacks the verdicts {key} of {self.folder}: give the folder of runs in "
                "which it was measured, or run the stage again"
            )
        metric = next(iter(measured.metrics))
        ids, prompts, references, responses = (table[name].to_pylist() for name in TEXTS)
        verdicts, pooled = table[metric].to_pylist(), metric in measured.pooled
        if pooled:
            verdicts = [None] * len(table)
        elif not pa.types.is_boolean(table.schema.field(metric).type):
            verdicts = [None if value is None else value / measured.full for value in verdicts]
        notes = table["note"].to_pylist()
        return Answers(metric, ids, prompts, references, responses, verdicts, notes, pooled)

    def samples(self, row: Row) -> pa.Table:
        """The samples of a row with the columns `evaluation.store.SAMPLES`, in the order of the problems."""
        assert row.keys is not None
        if row.keys.samples not in self._samples:
            self._samples[row.keys.samples] = self.store.samples(row.keys.samples)
        return self._samples[row.keys.samples]


def read_benchmark(
    name: str,
    folder: str | Path,
    store: str | Path | None = None,
    run: str = "",
    models: Mapping[str, str] | None = None,
) -> Benchmark:
    """Read a benchmark from its stage's folder.

    Args:
        store: folder of samples and verdicts; by default that of the folder of runs.
        models: model folders by name of the stage's input; by default the recorded ones.

    Raises:
        StageError: the stage is not finished, or its results are damaged or of another version.
    """
    folder = Path(folder)
    manifest = read_manifest(folder, "benchmark")
    try:
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        rows = [_row(flat) for flat in results["rows"]]
        best = _row(results["headline"]["student"])
        test = [row for row in rows if row.split == "test"]
        return Benchmark(
            name=name,
            run=run,
            folder=folder,
            manifest=manifest,
            rows=rows,
            swept=frozenset((point["model"], point["method"]) for point in results["chosen"]),
            sweep_split=results["aup"][0]["split"],
            reference=test[0],
            best=next(row for row in test if row.case == best.case),
            outcome=results["outcome"],
            default_student=results["default_student"],
            store=Store(folder.resolve().parents[1] / MEASUREMENTS if store is None else store),
            models=_models(folder, manifest) if models is None else models,
        )
    except ValidationError as error:
        raise StageError(unreadable(folder, plain_message(error.errors()[0]))) from error
    except (OSError, ValueError, KeyError, IndexError, TypeError, StopIteration, RecursionError) as error:
        raise StageError(unreadable(folder, f"{type(error).__name__}: {error}")) from error


def with_run(benchmark: Benchmark, run: str) -> Benchmark:
    """The benchmark with another label of its run."""
    return replace(benchmark, run=run)


def benchmark_name(folder: Path) -> str:
    """Name of the benchmark of a stage's folder `benchmark-<name>-<key>`, otherwise that of its problems."""
    if named := re.fullmatch(r"benchmark-(.+)-[0-9a-f]{10}", folder.name):
        return named[1]
    config = read_manifest(folder, "benchmark").config
    try:
        test = config["test"]
        sources = test.get("sources") or test["protocol"].get("data")
        return Path(sources[0]["path"]).stem if sources else str(test["benchmark"])
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise StageError(
            f"{folder / MANIFEST} is damaged (config.test names no problems): delete it and rerun; what is "
            "whole beside it is kept"
        ) from error


def _stage_of(experiment: Path, label: str, wanted: str | None) -> Manifest | None:
    """The finished stage of an experiment with a fingerprint."""
    made = (read_manifest(stage.parent) for stage in sorted(experiment.glob(f"{label}-*/{MANIFEST}")))
    return next((stage for stage in made if stage.fingerprint == wanted), None)


def _models(folder: Path, manifest: Manifest) -> dict[str, str]:
    """The recorded folders of the models, or those of the same name in the experiment if it was moved."""
    recorded = manifest.details.get("models", {})
    if not isinstance(recorded, dict):
        raise TypeError("details.models of the manifest is no JSON object")
    found: dict[str, str] = {}
    for name, path in recorded.items():
        places = (Path(path), folder.resolve().parent / Path(path).name)
        there = [place for place in places if (place / "config.json").is_file()]
        found |= {name: str(there[0])} if there else {}
    return found


def _row(flat: Mapping[str, Any]) -> Row:
    names = ("model", "method", "split", "keys", "operating_point", "qualifies")
    return ROW.validate_python({"measurement": flat, **{name: flat[name] for name in names}})


def unreadable(folder: Path, why: str) -> str:
    """What is said of a benchmark whose results cannot be read, with the remedy."""
    return (
        f"{folder / RESULTS} is damaged, or was written by another version of dparallel ({why}): delete "
        f"{folder} and run its stage again; samples are reused"
    )
