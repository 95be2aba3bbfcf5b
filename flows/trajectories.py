from functools import partial

from prefect import flow

from dparallel.stages.experiment import Experiment
from flows.command import main
from flows.dispatch import deal
from tasks.checks import checked_experiment
from tasks.trajectories import record_shards, record_trajectories


def plan(config: str, overrides: list[str] | None = None, on_pool: bool = False) -> Experiment:
    here = [] if on_pool else ["trajectories"]
    return checked_experiment(config, overrides, ["trajectories"], here)


@flow(name="trajectories")
def trajectories(
    config: str, overrides: list[str] | None = None, parent: str | None = None, on_pool: bool = False
) -> str:
    """Record how the teacher decodes every training problem.

    Args:
        config: a YAML file, see configs/.
        overrides: settings that replace the file's, `key.sub=value` each.
        parent: the distill run that this stage belongs to.
        on_pool: have the shards recorded by `launch.parts` runs of `shards/part` on its work pool,
            whichever workers pick them up; only the whole is checked and finished here.
    """
    return run(plan(config, overrides, on_pool), config, overrides, parent, on_pool)


def run(
    experiment: Experiment,
    config: str,
    overrides: list[str] | None = None,
    parent: str | None = None,
    on_pool: bool = False,
) -> str:
    settings = {"config": config, "overrides": overrides}
    on_workers = partial(deal, "shards/part", "numbers", experiment.config.launch.parts, settings)
    return record_trajectories(experiment.trajectories(), parent, on_workers if on_pool else None)


@flow(name="shards")
def shards(config: str, numbers: list[int], overrides: list[str] | None = None) -> str:
    """Record some shards of the trajectories, beside other runs that record the rest.

    Only the problems of these shards are rendered; the run that sends them has checked all.

    Args:
        config: a YAML file, see configs/.
        numbers: of the shards, from 0.
        overrides: settings that replace the file's, `key.sub=value` each.
    """
    experiment = checked_experiment(config, overrides, stages=[])
    return record_shards(experiment.trajectories(), numbers)


if __name__ == "__main__":
    main(trajectories, plan, run)
