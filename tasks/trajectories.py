from dparallel.stages.experiment import StagePlan
from dparallel.stages.storage import exchange
from dparallel.trajectories import record
from tasks.retries import resumable_task
from tasks.stages import is_finished, origin_of, run_tracked, storage_of
from tasks.tracking.records import Parent


@resumable_task("record-trajectories")
def record_trajectories(
    plan: StagePlan, parent: Parent | None = None, delegate: record.Delegate | None = None
) -> str:
    """Record trajectories, in this process or with `delegate`; returns the stage's folder."""
    storage = storage_of(plan)
    if storage is not None and not is_finished(plan):
        exchange.pull_alike(storage, plan.out_dir)  # whose responses may serve this stage, too
    if storage is not None and delegate is not None:
        delegate = exchange.through(delegate, storage, plan.out_dir)
    return run_tracked(
        plan,
        parent,
        lambda run: record.run_stage(plan.settings(), plan.inputs, plan.out_dir, delegate, origin_of(plan)),
    )


@resumable_task("record-shards")
def record_shards(plan: StagePlan, shards: list[int]) -> str:
    """Record some shards for a stage that another run finishes; returns the stage's folder."""

    def work() -> None:
        record.record_shards(plan.settings(), plan.inputs, plan.out_dir, shards, origin_of(plan))

    if (storage := storage_of(plan)) is None:
        work()
    else:
        exchange.help_with(storage, plan.out_dir, work)
    return plan.out_dir
