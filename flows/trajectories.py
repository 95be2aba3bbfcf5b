from functools import partial

from prefect import flow

from dparallel.stages.experiment import Experiment
from flows.command import main
from flows.dispatch import deal
from tasks.checks import checked_experiment
from tasks.trajectories import record_shards, record_trajectories


def plan(config: str, overrides: list[str] | None = None, on_pool: bool = False) -> Experiment:
    """Check the parameters and load the experiment."""
    here = [] if on_pool else ["trajectories"]
    return checked_experiment(config, overrides, ["trajectories"], here)


@flow(name="trajectories")
def trajectories(
    config: str, overrides: list[str] | None = None, parent: str | None = None, on_pool: bool = False
) -> str:
    """Record trajectories of the teacher on all training problems.

    Args:
        config: a YAML file, see configs/.
        overrides: settings `key.sub=value` that override the file.
        parent: the distill run that this stage belongs to.
        on_pool: have the shards recorded by `launch.parts` runs of `shards/part` on its work pool; this run
            checks them and finishes the stage.
    """
    return run(plan(config, overrides, on_pool), config, overrides, parent, on_pool)


def run(
    experiment: Experiment,
    config: str,
    overrides: list[str] | None = None,
    parent: str | None = None,
    on_pool: bool = False,
) -> str:
    """Record on this machine or on the work pool; returns the stage's folder."""
    settings = {"config": config, "overrides": overrides}
    on_workers = partial(deal, "shards/part", "numbers", experiment.config.launch.parts, settings)
    return record_trajectories(experiment.trajectories(), parent, on_workers if on_pool else None)


@flow(name="shards")
def shards(config: str, numbers: list[int], overrides: list[str] | None = None) -> str:
    """Record some shards of the trajectories; other runs record the rest.

    Only the prompts of these shards are tokenized; the dispatching run has checked all prompts.

    Args:
        config: a YAML file, see configs/.
        numbers: numbers of the shards, from 0.
        overrides: settings `key.sub=value` that override the file.
    """
    experiment = checked_experiment(config, overrides, stages=[])
    return record_shards(experiment.trajectories(), numbers)


if __name__ == "__main__":
    main(trajectories, plan, run)
