import logging
from pathlib import Path

import torch

from dparallel.config.experiment import LaunchConfig, StudentConfig
from dparallel.stages.experiment import StagePlan
from dparallel.stages.files import is_there
from dparallel.stages.lease import IN_USE, LeaseHeldError, remove_left
from dparallel.stages.manifest import MANIFEST, Manifest, verify
from dparallel.stages.metrics_log import METRICS
from tasks.launch import TrainingRefused, fit_to_gpus, launch
from tasks.retries import resumable_task
from tasks.stages import origin_of, run_tracked
from tasks.tracking.records import Parent
from tasks.tracking.run import Run

log = logging.getLogger("dparallel.training")


@resumable_task("train-student", "training {plan.student}")
def train_student(plan: StagePlan, launch_config: LaunchConfig, parent: Parent | None = None) -> str:
    """Distil a student in separate processes; returns the stage's folder."""

    folder = Path(plan.out_dir)

    def train(run: Run) -> Manifest:
        if not is_there(folder / MANIFEST):
            settings: StudentConfig = plan.settings()
            here = fit_to_gpus(
                launch_config, settings.training, settings.recipe.views, torch.cuda.device_count()
            )
            try:
                started = plan.model_copy(update={"origin": origin_of(plan)})
                launch(started, here, log.info, lambda: run.forward(folder / METRICS))
            except TrainingRefused as error:
                if IN_USE in str(error):
                    raise LeaseHeldError(str(error)) from error
                raise
            finally:
                remove_left(folder)
        return verify(folder, plan.stage)

    return run_tracked(plan, parent, train)
