from typing import Any

from prefect import flow

from dparallel.stages.experiment import StagePlan
from flows.command import main
from flows.dispatch import Workers, workers
from tasks.benchmark import make_units, run_benchmark
from tasks.checks import checked_experiment, ready_students


def plan(
    config: str, overrides: list[str] | None = None, on_pool: bool = False
) -> tuple[StagePlan, Workers | None]:
    """Check the parameters; returns the stage's plan, and how workers decode for it if `on_pool`."""
    here = [] if on_pool else ["benchmark"]
    experiment, _ = ready_students("benchmark", config, overrides, here=here)
    on_workers = workers("measurements/part", "units", experiment, config, overrides)
    return experiment.benchmark(), on_workers if on_pool else None


@flow(name="benchmark")
def benchmark(
    config: str, overrides: list[str] | None = None, parent: str | None = None, on_pool: bool = False
) -> str:
    """Measure the teacher and all students: accuracy, forward passes, speed.

    Args:
        config: a YAML file, see configs/.
        overrides: settings `key.sub=value` that override the file.
        parent: the distill run that this stage belongs to.
        on_pool: have missing samples decoded by `launch.parts` runs of `measurements/part` on its work
            pool, and judged there where that takes long; thresholds are selected in this run.
    """
    return run(plan(config, overrides, on_pool), parent=parent)


def run(planned: tuple[StagePlan, Workers | None], parent: str | None = None, **parameters: object) -> str:
    """Measure on this machine or on the work pool; returns the stage's folder."""
    stage, on_workers = planned
    return run_benchmark(stage, parent, on_workers)


@flow(name="measurements")
def measurements(config: str, units: list[dict[str, Any]], overrides: list[str] | None = None) -> str:
    """Decode and judge some units of the benchmark; other runs do the rest.

    Args:
        config: a YAML file, see configs/.
        units: the units, as requested by the benchmark flow.
        overrides: settings `key.sub=value` that override the file.
    """
    return make_units(checked_experiment(config, overrides, stages=[]).benchmark(), units)


if __name__ == "__main__":
    main(benchmark, plan, run)
