from typing import Any

from flows.environment import flow

from dparallel.stages.experiment import StagePlan
from flows.command import main
from flows.dispatch import Workers, workers
from flows.names import flow_run_name
from tasks.benchmark import make_units, run_benchmark
from tasks.checks import Given, Settings, all_overrides, checked_experiment, chosen, ready_students
from tasks.tracking.records import Parent, Promotion

Planned = tuple[list[tuple[StagePlan, Workers | None]], Promotion]


def plan(
    config: Given, overrides: list[str] | None = None, benchmark: str | None = None, on_pool: bool = False
) -> Planned:
    """Check the parameters.

    Returns:
        Pairs of a stage's plan and, if `on_pool`, how workers decode for it; and what decides on the aliases
        of the experiment's models.
    """
    here = [] if on_pool else ["benchmark"]
    experiment, _ = ready_students("benchmark", config, overrides, here=here)
    planned: list[tuple[StagePlan, Workers | None]] = []
    for name in chosen("benchmark", experiment.config.benchmarks, benchmark):
        on_workers = workers("measurements", "units", experiment, benchmark=name)
        planned.append((experiment.benchmark(name), on_workers if on_pool else None))
    folders = experiment.benchmark_folders()
    return planned, Promotion(benchmarks=folders, settings=experiment.config.promotion)


@flow("benchmark", flow_run_name)
def benchmark(
    config: Given,
    overrides: list[str] | None = None,
    benchmark: str | None = None,
    on_pool: bool = False,
    settings: Settings | None = None,
    parent: Parent | None = None,
) -> list[str]:
    """Measure the teacher and all students: accuracy, forward passes, speed.

    Args:
        config: a YAML file; a dict is the snapshot of a run in progress, as distill hands it on.
        overrides: settings `key.sub=value` that override the file and `settings`.
        benchmark: name of a benchmark in the config; by default all benchmarks.
        on_pool: have missing samples decoded by `launch.parts` runs of `measurements/measure-part` on its
            work pool, and judged there where that takes long; thresholds are selected in this run.
        settings: settings that override the file, as values.
        parent: leave it empty; a run of distill sets it in the runs of its stages.
    """
    return run(plan(config, all_overrides(settings, overrides), benchmark, on_pool), parent=parent)


def run(planned: Planned, parent: Parent | None = None, **parameters: object) -> list[str]:
    """Measure on this machine or on the work pool; returns the stages' folders."""
    stages, promotion = planned
    decides = promotion if parent is None else None  # otherwise the parent does
    return [run_benchmark(stage, parent, on_workers, decides) for stage, on_workers in stages]


@flow("measurements")
def measurements(
    config: Given, benchmark: str, units: list[dict[str, Any]], overrides: list[str] | None = None
) -> str:
    """Decode and judge some units of a benchmark; other runs do the rest.

    Args:
        config: a YAML file; a dict is the snapshot of a run in progress, as distill hands it on.
        benchmark: name of the benchmark in the config.
        units: the units, as requested by the benchmark flow.
        overrides: settings `key.sub=value` that override the file.
    """
    return make_units(checked_experiment(config, overrides, stages=[]).benchmark(benchmark), units)


if __name__ == "__main__":
    main(benchmark, plan, run)
