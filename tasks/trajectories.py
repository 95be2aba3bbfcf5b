from prefect import task
from prefect.cache_policies import NO_CACHE

from dparallel.stages.experiment import StagePlan
from dparallel.trajectories import record
from tasks.stages import run_tracked


@task(name="record-trajectories", cache_policy=NO_CACHE)
def record_trajectories(
    plan: StagePlan, parent: str | None = None, elsewhere: record.Elsewhere | None = None
) -> str:
    """Record how the teacher decodes, here or `elsewhere`; returns the stage's folder."""
    return run_tracked(
        plan,
        parent,
        lambda run: record.run_stage(plan.settings(), plan.inputs, plan.out_dir, elsewhere, plan.code),
    )


@task(name="record-shards")
def record_shards(plan: StagePlan, shards: list[int]) -> str:
    """Record some shards of the trajectories, which another run finishes; returns the stage's folder."""
    record.record_shards(plan.settings(), plan.inputs, plan.out_dir, shards, plan.code)
    return plan.out_dir
