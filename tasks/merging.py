from dparallel.distillation import merging
from dparallel.stages.experiment import StagePlan
from tasks.retries import resumable_task
from tasks.stages import origin_of, run_tracked
from tasks.tracking.records import Parent


@resumable_task("merge-student", "merging {plan.student}")
def merge_student(plan: StagePlan, parent: Parent | None = None) -> str:
    """Merge a student's adapter into the teacher; returns the stage's folder."""
    return run_tracked(
        plan,
        parent,
        lambda run: merging.run_stage(plan.settings(), plan.inputs, plan.out_dir, origin_of(plan)),
    )
