from collections.abc import Iterable
from functools import cache
from typing import Any, Literal, get_args

from flows.environment import flow

from prefect import get_run_logger

from dparallel.stages.experiment import Experiment
from flows.command import main
from flows.dispatch import DEPLOYMENTS, dispatch
from flows.names import flow_run_name, name_of
from tasks.benchmark import report, run_benchmark
from tasks.checks import Given, Settings, all_overrides, checked_experiment
from tasks.labels import tag_stage
from tasks.merging import merge_student
from tasks.stages import track_experiment
from tasks.tracking.run import Run
from tasks.training import train_student
from tasks.trajectories import record_trajectories

StageName = Literal["trajectories", "training", "merging", "benchmark"]


def plan(
    config: Given, overrides: list[str] | None = None, on_pools: tuple[StageName, ...] = ()
) -> Experiment:
    """Check the parameters and load the experiment."""
    return checked_experiment(config, overrides, here=set(get_args(StageName)) - set(on_pools))


@flow("distill", flow_run_name)
def distill(
    config: Given,
    overrides: list[str] | None = None,
    on_pools: tuple[StageName, ...] = (),
    settings: Settings | None = None,
) -> str:
    """Distil all students of a config, merge them, and compare them with the teacher on all benchmarks.

    Args:
        config: a YAML file; a dict is the snapshot of a run in progress, as distill hands it on.
        overrides: settings `key.sub=value` that override the file and `settings`.
        on_pools: stages to run as deployments on their work pools; the others run in this process.
        settings: settings that override the file, as values.
    """
    text = run(plan(config, all_overrides(settings, overrides), on_pools), on_pools)
    get_run_logger().info("\n%s", text)  # which `prefect deployment run --watch` shows
    return text


def run(experiment: Experiment, on_pools: tuple[StageName, ...] = (), **parameters: object) -> str:
    """Run all stages; returns the final report."""
    launch, snapshot = experiment.config.launch, cache(experiment.as_parameter)
    tag_stage("distill", experiment.config.name)
    with track_experiment(experiment) as tracked:

        def sent(stage: StageName, kind: str = "", names: Iterable[str] = ()) -> bool:
            """Run a stage on its work pool if `on_pools` lists it, and wait; False if it is to run here.

            Args:
                kind, names: the students or benchmarks of which each is a run of its own, side by side.
            """
            if stage in on_pools:
                common: dict[str, Any] = {
                    "config": snapshot(),
                    "parent": tracked.as_parent.model_dump(mode="json"),
                }
                runs = [{**common, kind: name} for name in names] or [common]
                named = {name_of(stage, run): run for run in runs}
                dispatch(DEPLOYMENTS[stage], named, launch.attempts, launch.timeout_hours)
            return stage in on_pools

        students, benchmarks = experiment.config.students, experiment.config.benchmarks
        recipes = experiment.config.recipes
        if not sent("trajectories"):
            record_trajectories(experiment.trajectories(), tracked.as_parent)
        if not sent("training", "student", recipes):
            for student in recipes:
                train_student(experiment.training(student), launch, tracked.as_parent)
        if not sent("merging", "student", students):
            for student in students:
                merge_student(experiment.merging(student), tracked.as_parent)
        if not sent("benchmark", "benchmark", benchmarks):
            for name in benchmarks:
                run_benchmark(experiment.benchmark(name), tracked.as_parent)
        return finish(experiment, tracked)


def finish(experiment: Experiment, run: Run) -> str:
    """Write the report of the finished stages, and return it as text."""
    stages = [experiment.trajectories()]
    stages += [experiment.training(student) for student in experiment.config.recipes]
    stages += [experiment.merging(student) for student in experiment.config.students]
    measured = [experiment.benchmark(name) for name in experiment.config.benchmarks]
    return report(experiment.folder, measured, stages, run, experiment.config.promotion)


if __name__ == "__main__":
    main(distill, plan, run)
