from prefect import flow

from dparallel.stages.experiment import StagePlan
from flows.command import main
from tasks.checks import checked_experiment, chosen_students
from tasks.merging import merge_student


def plan(config: str, overrides: list[str] | None = None, student: str | None = None) -> list[StagePlan]:
    experiment = checked_experiment(config, overrides)
    return [experiment.merging(name) for name in chosen_students(experiment, student)]


@flow(name="merging")
def merging(
    config: str, overrides: list[str] | None = None, student: str | None = None, parent: str | None = None
) -> list[str]:
    """Merge one student's adapter into the teacher, or that of all of them one after the other.

    Args:
        config: a YAML file, see configs/.
        overrides: settings that replace the file's, `key.sub=value` each.
        student: a name of the config's `students`; all of them unless told.
        parent: the distill run that this stage belongs to.
    """
    return [merge_student(each, parent) for each in plan(config, overrides, student)]


if __name__ == "__main__":
    main(merging, plan)
