from prefect import flow

from dparallel.experiment import StagePlan
from flows.command import main
from tasks.benchmark import run_benchmark
from tasks.checks import checked_experiment


def plan(config: str, overrides: list[str] | None = None) -> StagePlan:
    return checked_experiment(config, overrides).benchmark()


@flow(name="benchmark")
def benchmark(config: str, overrides: list[str] | None = None, parent: str | None = None) -> str:
    """Measure the teacher and every student: accuracy, forward passes, speed.

    Args:
        config: a YAML file, see configs/.
        overrides: settings that replace the file's, `key.sub=value` each.
        parent: the distill run that this stage belongs to.
    """
    return run_benchmark(plan(config, overrides), parent)


if __name__ == "__main__":
    main(benchmark, plan)
