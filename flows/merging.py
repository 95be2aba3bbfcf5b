from flows.environment import flow

from dparallel.stages.experiment import StagePlan
from flows.command import main
from flows.names import flow_run_name
from tasks.checks import Given, Settings, all_overrides, ready_students
from tasks.merging import merge_student
from tasks.tracking.records import Parent


def plan(config: Given, overrides: list[str] | None = None, student: str | None = None) -> list[StagePlan]:
    """Check the parameters; returns the plans of the students to merge."""
    experiment, students = ready_students("merging", config, overrides, student)
    return [experiment.merging(name) for name in students]


@flow("merging", flow_run_name)
def merging(
    config: Given,
    overrides: list[str] | None = None,
    student: str | None = None,
    settings: Settings | None = None,
    parent: Parent | None = None,
) -> list[str]:
    """Merge a student's adapter into the teacher, or the adapters of all students in turn.

    Args:
        config: a YAML file; a dict is the snapshot of a run in progress, as distill hands it on.
        overrides: settings `key.sub=value` that override the file and `settings`.
        student: name of a student in the config; by default all students.
        settings: settings that override the file, as values.
        parent: leave it empty; a run of distill sets it in the runs of its stages.
    """
    return run(plan(config, all_overrides(settings, overrides), student), parent=parent)


def run(plans: list[StagePlan], parent: Parent | None = None, **parameters: object) -> list[str]:
    """Merge the planned students; returns their folders."""
    return [merge_student(student, parent) for student in plans]


if __name__ == "__main__":
    main(merging, plan, run)
