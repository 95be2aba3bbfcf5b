from prefect import task

from dparallel.experiment import StagePlan
from dparallel.trajectories import record
from tasks.stages import run_tracked


@task(name="record-trajectories")
def record_trajectories(plan: StagePlan, parent: str | None = None) -> str:
    """Record how the teacher decodes; returns the stage's folder."""
    return run_tracked(plan, parent, lambda run: record.run_stage(plan.settings(), plan.inputs, plan.out_dir))
