from flows.environment import flow

from dparallel.stages.experiment import StagePlan
from flows.command import main
from flows.dispatch import Workers, workers
from flows.names import flow_run_name
from tasks.checks import Given, Settings, all_overrides, checked_experiment
from tasks.tracking.records import Parent
from tasks.trajectories import record_shards, record_trajectories


def plan(
    config: Given, overrides: list[str] | None = None, on_pool: bool = False
) -> tuple[StagePlan, Workers | None]:
    """Check the parameters; returns the stage's plan, and how workers record for it if `on_pool`."""
    here = [] if on_pool else ["trajectories"]
    experiment = checked_experiment(config, overrides, ["trajectories"], here)
    on_workers = workers("shards", "numbers", experiment)
    return experiment.trajectories(), on_workers if on_pool else None


@flow("trajectories", flow_run_name)
def trajectories(
    config: Given,
    overrides: list[str] | None = None,
    on_pool: bool = False,
    settings: Settings | None = None,
    parent: Parent | None = None,
) -> str:
    """Record trajectories of the teacher on all training problems.

    Args:
        config: a YAML file; a dict is the snapshot of a run in progress, as distill hands it on.
        overrides: settings `key.sub=value` that override the file and `settings`.
        on_pool: have the shards recorded by `launch.parts` runs of `shards/record-part` on its work pool;
            this run checks them and finishes the stage.
        settings: settings that override the file, as values.
        parent: leave it empty; a run of distill sets it in the runs of its stages.
    """
    return run(plan(config, all_overrides(settings, overrides), on_pool), parent=parent)


def run(planned: tuple[StagePlan, Workers | None], parent: Parent | None = None, **parameters: object) -> str:
    """Record on this machine or on the work pool; returns the stage's folder."""
    stage, on_workers = planned
    return record_trajectories(stage, parent, on_workers)


@flow("shards")
def shards(config: Given, numbers: list[int], overrides: list[str] | None = None) -> str:
    """Record some shards of the trajectories; other runs record the rest.

    Only the prompts of these shards are tokenized; the dispatching run has checked all prompts.

    Args:
        config: a YAML file; a dict is the snapshot of a run in progress, as distill hands it on.
        numbers: numbers of the shards, from 0.
        overrides: settings `key.sub=value` that override the file.
    """
    experiment = checked_experiment(config, overrides, stages=[])
    return record_shards(experiment.trajectories(), numbers)


if __name__ == "__main__":
    main(trajectories, plan, run)
