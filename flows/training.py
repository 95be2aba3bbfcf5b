from flows.environment import flow

from dparallel.config.experiment import LaunchConfig
from dparallel.stages.experiment import StagePlan
from flows.command import main
from flows.names import flow_run_name
from tasks.checks import Given, Settings, all_overrides, ready_students
from tasks.tracking.records import Parent
from tasks.training import train_student


def plan(
    config: Given, overrides: list[str] | None = None, student: str | None = None
) -> tuple[LaunchConfig, list[StagePlan]]:
    """Check the parameters; returns the launch settings and the plans of the students to train."""
    experiment, students = ready_students("training", config, overrides, student, here=["training"])
    return experiment.config.launch, [experiment.training(name) for name in students]


@flow("training", flow_run_name)
def training(
    config: Given,
    overrides: list[str] | None = None,
    student: str | None = None,
    settings: Settings | None = None,
    parent: Parent | None = None,
) -> list[str]:
    """Distil a student, or all students in turn.

    Args:
        config: a YAML file; a dict is the snapshot of a run in progress, as distill hands it on.
        overrides: settings `key.sub=value` that override the file and `settings`.
        student: name of a student in the config; by default all students.
        settings: settings that override the file, as values.
        parent: leave it empty; a run of distill sets it in the runs of its stages.
    """
    return run(plan(config, all_overrides(settings, overrides), student), parent=parent)


def run(
    planned: tuple[LaunchConfig, list[StagePlan]], parent: Parent | None = None, **parameters: object
) -> list[str]:
    """Train the planned students; returns their folders."""
    launch, plans = planned
    return [train_student(student, launch, parent) for student in plans]


if __name__ == "__main__":
    main(training, plan, run)
