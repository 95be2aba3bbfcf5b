"""The stages of an experiment: their folders and inputs.

The name of a stage's folder ends with a key of the settings that determine its result, its inputs'
fingerprints and its code digest. A finished stage is therefore found again, and any change makes a new folder
next to the old one.
"""

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dparallel.config.base import Config, ConfigError, explain, nearest
from dparallel.config.experiment import (
    MEASUREMENTS,
    RUNS,
    BenchmarkConfig,
    DistillConfig,
    MergingConfig,
    StudentConfig,
    TrajectoriesConfig,
)
from dparallel.config.recipe import RecipeConfig
from dparallel.config.teacher import TeacherConfig
from dparallel.stages.files import is_there
from dparallel.stages.manifest import (
    CLAIM,
    MANIFEST,
    Manifest,
    StageError,
    claimed_code,
    fingerprint,
    stage_key,
)
from dparallel.stages.origin import Origin
from dparallel.stages.snapshot import Snapshot, snapshot_of
from dparallel.stages.storage.folders import open_storage
from dparallel.stages.storage.inputs import published

log = logging.getLogger(__name__)


SETTINGS: dict[str, type[Config]] = {
    "teacher": TeacherConfig,
    "trajectories": TrajectoriesConfig,
    "training": StudentConfig,
    "merging": MergingConfig,
    "benchmark": BenchmarkConfig,
}


class StagePlan(BaseModel):
    """A stage that is ready to run, as small JSON values that can be sent to other processes and machines.

    Attributes:
        stage: stage name, a key of `SETTINGS`.
        student: student name, for training and merging.
        benchmark: benchmark name, for benchmarks.
        config: settings of the stage as JSON values.
        inputs: folders of the inputs, by name.
        out_dir: folder of the stage.
        measurements: folder of the samples and verdicts that all experiments of a runs folder share.
        store: URL of the store through which machines exchange results; None if there is none.
        runs: folder of runs of this machine, which the store mirrors.
        sets_defaults: whether what a benchmark chooses becomes the students' decode defaults.
        origin: the run that the stage belongs to.
    """

    model_config = ConfigDict(frozen=True)

    stage: str
    student: str | None = None
    benchmark: str | None = None
    config: dict[str, Any]
    inputs: dict[str, str]
    out_dir: str
    measurements: str = MEASUREMENTS
    store: str | None = None
    runs: str = RUNS
    sets_defaults: bool = False
    origin: Origin = Origin()

    def settings(self) -> Any:
        """`config` as the stage's settings class; ConfigError if it is invalid or the stage unknown."""
        if self.stage not in SETTINGS:
            raise ConfigError(f"unknown stage {self.stage!r}; known: {', '.join(SETTINGS)}")
        try:
            return SETTINGS[self.stage].model_validate(self.config)
        except ValidationError as error:
            raise ConfigError(f"plan of stage {self.stage!r}: {explain(error)}") from error


class Experiment:
    """Plans the stages of a `DistillConfig`. A stage can be planned once its inputs are finished."""

    def __init__(
        self,
        config: DistillConfig,
        folder_of: Callable[[str], str | Path] = Path,
        snapshot: Snapshot | None = None,
    ):
        """Store the config; nothing is planned or read yet.

        Args:
            folder_of: maps a model of the config to its folder, for example `models.hub.checkpoint_folder`,
                which accepts Hugging Face Hub ids; called once per model, when first needed.
            snapshot: the settings and code of the run; by default those of a run that starts now.
        """
        self.config = config
        self.snapshot = snapshot or snapshot_of(config, config.name)
        self.storage = None if config.store is None else open_storage(config.store, config.runs)
        self.folder = Path(config.runs) / config.name
        self._folder_of = cache(folder_of)
        self._told: set[Path] = set()

    def trajectories(self) -> StagePlan:
        """Plan of the trajectories stage."""
        return self._plan("trajectories", self.config.trajectories, {"teacher": self._teacher})

    def training(self, student: str) -> StagePlan:
        """Plan of the training of one of `config.recipes`; StageError if an input is not finished."""
        config = StudentConfig(training=self.config.training, recipe=self._recipe(student))
        inputs = {"teacher": self._teacher, "trajectories": self.trajectories().out_dir}
        return self._plan("training", config, inputs, student)

    def merging(self, student: str) -> StagePlan:
        """Plan of a student's merging; StageError if an input is not finished."""
        config = self.config.merging
        if (trained := self.config.adapters.get(student)) is not None:
            config = config.model_copy(update={"attention": trained.attention})
            inputs = {"teacher": self._teacher, "adapter": str(self._folder_of(trained.adapter))}
            if config.commit_rule is not None:  # which is fitted on them
                inputs["trajectories"] = self.trajectories().out_dir
        else:
            inputs = {
                "teacher": self._teacher,
                "trajectories": self.trajectories().out_dir,
                "training": self.training(student).out_dir,
            }
        return self._plan("merging", config, inputs, student)

    def benchmark(self, name: str) -> StagePlan:
        """Plan of a benchmark; StageError if an input is not finished."""
        if name not in self.config.benchmarks:
            known = list(self.config.benchmarks)
            raise ConfigError(
                f"unknown benchmark {name!r}; {nearest(name, known)}this config has {', '.join(known)}"
            )
        settings = self.config.benchmarks[name]
        students = {f"student/{student}": self.merging(student).out_dir for student in self.config.students}
        others = {
            f"baseline/{rival}": str(self._folder_of(baseline.model))
            for rival, baseline in settings.baselines.items()
        }
        inputs = {"teacher": self._teacher, **students, **others}
        plan = self._plan("benchmark", settings, inputs, benchmark=name)
        return plan.model_copy(update={"sets_defaults": name == self.config.setting_defaults})

    def benchmark_folders(self) -> list[str]:
        """Folders of all benchmarks; StageError if an input is not finished."""
        return [self.benchmark(name).out_dir for name in self.config.benchmarks]

    def is_finished(self, folder: str | Path) -> bool:
        """Whether a stage is finished, here or in the store."""
        return is_there(Path(folder) / MANIFEST) or self._in_store(folder) is not None

    def as_parameter(self) -> dict[str, Any]:
        """The run's snapshot as JSON values that mean the same to workers on other machines.

        With a store, inputs of this machine are written there, and every worker has its own folder of runs.
        """
        parameter = self.snapshot.as_parameter()
        if self.storage is not None:
            parameter["settings"] = published(parameter["settings"], self.storage)
        return parameter

    def _fingerprint(self, folder: str) -> str:
        """Fingerprint of an input, trusting manifests: what reads the files verifies them."""
        if not is_there(Path(folder) / MANIFEST) and (there := self._in_store(folder)) is not None:
            return there.fingerprint
        return fingerprint(folder, hashed=False)

    def _in_store(self, folder: str | Path) -> Manifest | None:
        if self.storage is None or not self.storage.holds(folder):
            return None
        return self.storage.manifest(folder)

    @property
    def _teacher(self) -> str:
        return str(self._folder_of(self.config.teacher))

    def _recipe(self, student: str) -> RecipeConfig:
        recipes = self.config.recipes
        if student not in recipes:
            known = list(recipes)
            raise ConfigError(
                f"unknown student {student!r}; {nearest(student, known)}this config trains {', '.join(known)}"
            )
        return recipes[student]

    def _plan(
        self,
        stage: str,
        config: Config,
        inputs: dict[str, str],
        student: str | None = None,
        benchmark: str | None = None,
    ) -> StagePlan:
        try:
            made_from = {key: self._fingerprint(path) for key, path in inputs.items()}
        except StageError as error:
            raise StageError(f"stage {stage!r} cannot start: {error}") from error
        vouched = {str(name): digest for name, digest in self.config.code.items()}.get(stage)
        digests = self.snapshot.code
        started_with = digests.get(f"{stage}-{student or benchmark}") or digests[stage]
        code = vouched or started_with
        label = "-".join(filter(None, (stage, student or benchmark)))
        folder = self.folder / f"{label}-{stage_key(config, made_from, code)}"
        if not folder.exists():
            self._tell_of_other_code(label, config, made_from)
        return StagePlan(
            stage=stage,
            student=student,
            benchmark=benchmark,
            config=config.model_dump(mode="json"),
            inputs=inputs,
            out_dir=str(folder),
            measurements=str(Path(self.config.runs) / MEASUREMENTS),
            store=self.config.store,
            runs=self.config.runs,
            origin=Origin(
                config=self.snapshot.config,
                overrides=self.snapshot.overrides,
                vouched=vouched,
                code=started_with,
            ),
        )

    def _tell_of_other_code(self, label: str, config: Config, inputs: dict[str, str]) -> None:
        """Log the folders that other code versions made from the same settings and inputs."""
        for claim in sorted(self.folder.glob(f"{label}-*/{CLAIM}")):
            code, folder = claimed_code(claim.parent), claim.parent
            same = code is not None and folder.name == f"{label}-{stage_key(config, inputs, code)}"
            if same and folder not in self._told:
                self._told.add(folder)
                log.warning(
                    "%s was made by other code (%s); to keep using it set code.%s: %s",
                    folder,
                    code,
                    label.split("-")[0],
                    code,
                )
