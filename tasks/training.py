from pathlib import Path

from prefect import get_run_logger, task

from dparallel.config import LaunchConfig
from dparallel.evaluation import plots
from dparallel.experiment import StagePlan
from dparallel.manifest import MANIFEST, Manifest, verify
from dparallel.metrics_log import METRICS
from tasks.launch import launch
from tasks.stages import run_tracked
from tasks.tracking import Run


@task(name="train-student")
def train_student(plan: StagePlan, launch_config: LaunchConfig, parent: str | None = None) -> str:
    """Distil one student in processes of its own; returns the stage's folder."""

    def train(run: Run) -> Manifest:
        folder = Path(plan.out_dir)
        if not (folder / MANIFEST).is_file():
            log = get_run_logger()
            launch(plan, launch_config, log.info, lambda: run.forward(folder / METRICS))
        return verify(folder, plan.stage)

    return run_tracked(plan, parent, train)


@task(name="draw-loss-curves")
def draw_loss_curves(plans: dict[str, StagePlan], path: Path) -> str:
    """One picture of the training of every student; returns its path."""
    plots.loss_curves({name: Path(plan.out_dir) / METRICS for name, plan in plans.items()}, path)
    return str(path)
