from prefect import flow

from dparallel.experiment import StagePlan
from flows.command import main
from tasks.checks import checked_experiment
from tasks.trajectories import record_trajectories


def plan(config: str, overrides: list[str] | None = None) -> StagePlan:
    return checked_experiment(config, overrides).trajectories()


@flow(name="trajectories")
def trajectories(config: str, overrides: list[str] | None = None, parent: str | None = None) -> str:
    """Record how the teacher decodes every training problem.

    Args:
        config: a YAML file, see configs/.
        overrides: settings that replace the file's, `key.sub=value` each.
        parent: the distill run that this stage belongs to.
    """
    return record_trajectories(plan(config, overrides), parent)


if __name__ == "__main__":
    main(trajectories, plan)
