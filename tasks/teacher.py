from pathlib import Path

from prefect import task

from dparallel.config.teacher import TeacherConfig
from dparallel.stages.experiment import StagePlan
from dparallel.stages.manifest import Manifest
from dparallel.tiny import pretraining
from tasks.stages import run_tracked, when_free


@task(name="train-teacher")
def train_teacher(config: TeacherConfig) -> str:
    """Train the tiny teacher from scratch; returns its folder."""
    plan = StagePlan(stage="teacher", config=config.model_dump(mode="json"), inputs={}, out_dir=config.out)

    def train() -> Manifest:
        return pretraining.run_stage(config, {}, config.out)

    return run_tracked(plan, None, lambda run: when_free(config.out, train), home=Path("runs/teacher"))
