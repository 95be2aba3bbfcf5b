from prefect import flow

from dparallel.config.experiment import LaunchConfig
from dparallel.stages.experiment import StagePlan
from flows.command import main
from tasks.checks import checked_experiment, chosen_students
from tasks.training import train_student


def plan(
    config: str, overrides: list[str] | None = None, student: str | None = None
) -> tuple[LaunchConfig, list[StagePlan]]:
    experiment = checked_experiment(config, overrides, here=["training"])
    plans = [experiment.training(name) for name in chosen_students(experiment, student)]
    return experiment.config.launch, plans


@flow(name="training")
def training(
    config: str, overrides: list[str] | None = None, student: str | None = None, parent: str | None = None
) -> list[str]:
    """Distil one student, or all of them one after the other.

    Args:
        config: a YAML file, see configs/.
        overrides: settings that replace the file's, `key.sub=value` each.
        student: a name of the config's `students`; all of them unless told.
        parent: the distill run that this stage belongs to.
    """
    launch, plans = plan(config, overrides, student)
    return [train_student(each, launch, parent) for each in plans]


if __name__ == "__main__":
    main(training, plan)
