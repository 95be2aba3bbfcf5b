from dparallel.stages.experiment import StagePlan
from dparallel.trajectories import record
from tasks.retries import resumable_task
from tasks.stages import origin_of, run_tracked
from tasks.tracking.records import Parent


@resumable_task("record-trajectories")
def record_trajectories(
    plan: StagePlan, parent: Parent | None = None, delegate: record.Delegate | None = None
) -> str:
    """Record trajectories, in this process or with `delegate`; returns the stage's folder."""
    return run_tracked(
        plan,
        parent,
        lambda run: record.run_stage(plan.settings(), plan.inputs, plan.out_dir, delegate, origin_of(plan)),
    )


@resumable_task("record-shards")
def record_shards(plan: StagePlan, shards: list[int]) -> str:
    """Record some shards for a stage that another run finishes; returns the stage's folder."""
    record.record_shards(plan.settings(), plan.inputs, plan.out_dir, shards, origin_of(plan))
    return plan.out_dir
