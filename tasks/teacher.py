from pathlib import Path

from dparallel.config.teacher import TeacherConfig
from dparallel.stages.experiment import StagePlan
from dparallel.stages.origin import Origin
from dparallel.tiny import pretraining
from tasks.retries import resumable_task
from tasks.stages import origin_of, run_tracked


@resumable_task("train-teacher")
def train_teacher(config: TeacherConfig, file: str, overrides: list[str]) -> str:
    """Train the tiny teacher from scratch; returns its folder.

    Args:
        file, overrides: where `config` comes from.
    """
    origin = Origin(config=file, overrides=tuple(overrides))
    settings = config.model_dump(mode="json")
    plan = StagePlan(stage="teacher", config=settings, inputs={}, out_dir=config.out, origin=origin)
    return run_tracked(
        plan,
        None,
        lambda run: pretraining.run_stage(config, {}, config.out, origin_of(plan)),
        home=Path("runs/teacher"),
    )
