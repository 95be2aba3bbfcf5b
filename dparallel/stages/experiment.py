"""Where each stage of an experiment lives and what it is made from.

A stage's folder carries a key of its settings and its inputs' fingerprints. So a stage already
done with the same inputs is found again, and changed settings make a new folder beside the old.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from dparallel.config.base import Config
from dparallel.config.experiment import (
    BenchmarkConfig,
    DistillConfig,
    MergingConfig,
    TrainingConfig,
    TrajectoriesConfig,
)
from dparallel.config.problems import ProblemsConfig
from dparallel.config.recipe import RecipeConfig
from dparallel.stages.manifest import StageError, digest, file_digest, fingerprint


class StudentConfig(Config):
    """What a training stage is made of: how to train, and the recipe."""

    training: TrainingConfig
    recipe: RecipeConfig


SETTINGS: dict[str, type[Config]] = {
    "trajectories": TrajectoriesConfig,
    "training": StudentConfig,
    "merging": MergingConfig,
    "benchmark": BenchmarkConfig,
}


class StagePlan(BaseModel):
    """One stage, ready to run: small JSON, so it crosses process and machine borders."""

    model_config = ConfigDict(frozen=True)

    stage: str
    student: str | None = None
    config: dict[str, Any]
    inputs: dict[str, str]
    out_dir: str

    def settings(self) -> Any:
        """`config` as the stage's own settings class."""
        return SETTINGS[self.stage].model_validate(self.config)


class Experiment:
    """The stages of one `DistillConfig`. Planning a stage needs the ones before it finished."""

    def __init__(self, config: DistillConfig):
        self.config = config
        self.folder = Path(config.runs) / config.name

    def trajectories(self) -> StagePlan:
        return self._plan("trajectories", None, self.config.trajectories, {"teacher": self.config.teacher})

    def training(self, student: str) -> StagePlan:
        config = StudentConfig(training=self.config.training, recipe=self._recipe(student))
        inputs = {"teacher": self.config.teacher, "trajectories": self.trajectories().out_dir}
        return self._plan("training", student, config, inputs)

    def merging(self, student: str) -> StagePlan:
        inputs = {
            "teacher": self.config.teacher,
            "trajectories": self.trajectories().out_dir,
            "training": self.training(student).out_dir,
        }
        return self._plan("merging", student, self.config.merging, inputs)

    def benchmark(self) -> StagePlan:
        students = {f"student/{name}": self.merging(name).out_dir for name in self.config.students}
        baselines = self.config.benchmark.baselines
        others = {f"baseline/{name}": baseline.model for name, baseline in baselines.items()}
        inputs = {"teacher": self.config.teacher, **students, **others}
        return self._plan("benchmark", None, self.config.benchmark, inputs)

    def _recipe(self, student: str) -> RecipeConfig:
        if student not in self.config.students:
            raise ValueError(
                f"unknown student {student!r}; this config trains {', '.join(self.config.students)}"
            )
        return self.config.students[student]

    def _plan(self, stage: str, student: str | None, config: Config, inputs: dict[str, str]) -> StagePlan:
        try:
            made_from = {name: fingerprint(path) for name, path in inputs.items()}
        except StageError as error:
            raise StageError(f"stage {stage!r} cannot start: {error}") from error
        settings = config.model_dump(mode="json")
        problems = [section for _, section in config if isinstance(section, ProblemsConfig)]
        data = [file_digest(file) for section in problems for file in section.files()]
        key = digest({"config": settings, "inputs": made_from, "data": data})[:10]
        label = f"{stage}-{student}-{key}" if student else f"{stage}-{key}"
        return StagePlan(
            stage=stage, student=student, config=settings, inputs=inputs, out_dir=str(self.folder / label)
        )
