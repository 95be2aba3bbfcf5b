from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dparallel.evaluation import plots, sharing
from dparallel.evaluation.sharing import Delegate
from dparallel.evaluation.stage import run_stage
from dparallel.evaluation.store import Store
from dparallel.reporting.next_steps import next_steps
from dparallel.reporting.read import read_benchmark
from dparallel.reporting.report import report_folder, write_report
from dparallel.stages.experiment import StagePlan
from dparallel.stages.manifest import read_manifest
from dparallel.stages.metrics_log import METRICS
from dparallel.stages.storage import exchange
from dparallel.stages.storage.folders import Storage
from tasks.retries import resumable_task
from tasks.stages import origin_of, publish, run_tracked, storage_of
from tasks.tracking.records import Parent, how_to_open
from tasks.tracking.run import Run


@resumable_task("run-benchmark", "benchmark {plan.benchmark}")
def run_benchmark(
    plan: StagePlan,
    parent: Parent | None = None,
    delegate: Delegate | None = None,
    benchmarks: Iterable[str] = (),
) -> str:
    """Measure teacher and students, in this process or with `delegate`; returns the stage's folder.

    Args:
        benchmarks: folders of all benchmarks of the experiment: a student becomes the candidate in MLflow
            when it keeps the accuracy in all of them. By default this one alone.
    """
    storage = storage_of(plan)
    if storage is not None:
        exchange.pull_stages(storage, set(benchmarks) - {plan.out_dir})
        if delegate is not None:
            delegate = exchange.bringing(delegate, storage)
    store = Store(plan.measurements, storage)
    return run_tracked(
        plan,
        parent,
        lambda run: run_stage(plan.settings(), plan.inputs, plan.out_dir, store, delegate, origin_of(plan)),
        benchmarks=benchmarks,
    )


@resumable_task("make-units")
def make_units(plan: StagePlan, units: list[dict[str, Any]]) -> str:
    """Decode and judge some units for a benchmark that another run finishes; returns the store's folder."""
    plan.origin.accepted_code(plan.stage, plan.settings())
    if (storage := storage_of(plan)) is not None:
        models = {unit.get("model") for unit in units}
        exchange.pull_stages(storage, [folder for name, folder in plan.inputs.items() if name in models])
    sharing.make_units(plan.settings(), plan.inputs, Store(plan.measurements, storage), units)
    return plan.measurements


@resumable_task("report")
def report(home: Path, plans: list[StagePlan], trainings: dict[str, StagePlan], run: Run) -> str:
    """The final report: tables, pictures, merged models, next commands, and how to open report and MLflow.

    Args:
        home: the experiment's folder.
        plans: the finished benchmark stages, of the same models.
        trainings: the finished training stages by student, whose loss curves are drawn.
        run: the experiment's own run, on which experiments are compared.
    """
    if (storage := storage_of(plans[0])) is not None:
        _pull(storage, [*plans, *trainings.values()])
    stages = [(plan.benchmark or "benchmark", Path(plan.out_dir)) for plan in plans]
    models = {name: path for plan in plans for name, path in plan.inputs.items()}
    folder = report_folder(home, stages)
    report_files = write_report(home.name, stages, plans[0].measurements, models, folder)
    curves = folder / "loss_curves.png"
    plots.loss_curves({name: Path(plan.out_dir) / METRICS for name, plan in trainings.items()}, curves)

    manifests = {name: read_manifest(stage) for name, stage in stages}
    tables = [stage / "table.md" for _, stage in stages]
    pictures = [
        stage / file for name, stage in stages for file in manifests[name].files if file.endswith(".png")
    ]
    text = "\n\n".join(table.read_text(encoding="utf-8").strip() for table in tables)
    metrics = next(iter(manifests.values())).metrics
    uploaded = [*report_files, curves]
    if len(stages) == 1:
        uploaded += [*tables, *pictures]
    else:  # whose files have equal names
        text = (folder / "report.md").read_text(encoding="utf-8").strip()
        metrics = {
            f"{name}/{key}": value for name in manifests for key, value in manifests[name].metrics.items()
        }
    run.update(files=[str(path.resolve()) for path in uploaded], metrics=metrics)
    publish(home.name, "distill", text, run.link)
    lines = [
        text,
        "",
        "pictures:",
        *(f"  {picture}" for picture in (*pictures, curves)),
        *next_steps(read_benchmark(*stages[0], plans[0].measurements, models=models), home.parent),
        "report:",
        f"  {folder / 'report.html'}",
        "MLflow:",
        f"  {how_to_open()}",
    ]
    return "\n".join(lines)


def _pull(storage: Storage, plans: Sequence[StagePlan]) -> None:
    """Bring what a report reads: benchmarks with their models and samples, and training curves."""
    exchange.pull_stages(storage, {plan.out_dir for plan in plans})
    for plan in plans:
        if plan.stage == "benchmark":
            exchange.pull_stages(storage, plan.inputs.values())
            for file in read_manifest(plan.out_dir).details["measurements"]:
                storage.bring((Path(plan.measurements) / file).parent)
