from functools import partial
from typing import Any

from prefect import flow

from dparallel.stages.experiment import Experiment
from flows.command import main
from flows.dispatch import deal
from tasks.benchmark import make_units, run_benchmark
from tasks.checks import check_ready, checked_experiment


def plan(config: str, overrides: list[str] | None = None, on_pool: bool = False) -> Experiment:
    """Check the parameters and load the experiment."""
    here = [] if on_pool else ["benchmark"]
    experiment = checked_experiment(config, overrides, ["benchmark"], here)
    check_ready("benchmark", experiment, list(experiment.config.students), config, overrides)
    return experiment


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
    return run(plan(config, overrides, on_pool), config, overrides, parent, on_pool)


def run(
    experiment: Experiment,
    config: str,
    overrides: list[str] | None = None,
    parent: str | None = None,
    on_pool: bool = False,
) -> str:
    """Measure on this machine or on the work pool; returns the stage's folder."""
    settings = {"config": config, "overrides": overrides}
    on_workers = partial(deal, "measurements/part", "units", experiment.config.launch.parts, settings)
    return run_benchmark(experiment.benchmark(), parent, on_workers if on_pool else None)


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
