from typing import Literal, get_args

from prefect import Flow, flow, runtime

from dparallel.stages.experiment import Experiment
from flows.benchmark import benchmark
from flows.command import main
from flows.dispatch import dispatch
from flows.merging import merging
from flows.training import training
from flows.trajectories import trajectories
from tasks.benchmark import report
from tasks.checks import checked_experiment
from tasks.tracking.run import Run, track
from tasks.training import draw_loss_curves

StageName = Literal["trajectories", "training", "merging", "benchmark"]


def plan(config: str, overrides: list[str] | None = None, on_pools: tuple[StageName, ...] = ()) -> Experiment:
    return checked_experiment(config, overrides, here=set(get_args(StageName)) - set(on_pools))


@flow(name="distill")
def distill(config: str, overrides: list[str] | None = None, on_pools: tuple[StageName, ...] = ()) -> str:
    """Distil every student of a config, merge it, and compare it with its teacher.

    Args:
        config: a YAML file, see configs/.
        overrides: settings that replace the file's, `key.sub=value` each.
        on_pools: stages to run as their own deployments on their work pools; the others run here.
    """
    experiment = plan(config, overrides, on_pools)
    settings = experiment.config.model_dump(mode="json")
    with track(experiment.folder, "distill", runtime.flow_run.name, settings) as run:

        def stage(each: Flow, **choice: str) -> None:
            parameters = {"config": config, "overrides": overrides, "parent": run.id, **choice}
            name = " ".join([each.name, *choice.values()])
            if each.name in on_pools:
                dispatch(f"{each.name}/stage", name, parameters)
            else:
                each.with_options(flow_run_name=name)(**parameters)

        stage(trajectories)
        for student in experiment.config.students:
            stage(training, student=student)
            stage(merging, student=student)
        stage(benchmark)
        return finish(experiment, run)


def finish(experiment: Experiment, run: Run) -> str:
    """Draw the loss curves and say where everything is."""
    trainings = {student: experiment.training(student) for student in experiment.config.students}
    measured = experiment.benchmark()
    curves = draw_loss_curves(trainings, experiment.folder / f"loss_curves-{measured.out_dir[-10:]}.png")
    return report(measured, curves, run)


if __name__ == "__main__":
    main(distill, plan)
