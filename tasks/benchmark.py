from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from dparallel.evaluation import sharing
from dparallel.evaluation.sharing import Delegate
from dparallel.evaluation.stage import run_stage
from dparallel.stages.experiment import StagePlan
from dparallel.stages.manifest import read_manifest
from tasks.stages import publish, run_tracked
from tasks.tracking.records import how_to_open
from tasks.tracking.run import Run


@task(name="run-benchmark", cache_policy=NO_CACHE)
def run_benchmark(plan: StagePlan, parent: str | None = None, delegate: Delegate | None = None) -> str:
    """Measure teacher and students, in this process or with `delegate`; returns the stage's folder."""
    return run_tracked(
        plan, parent, lambda run: run_stage(plan.settings(), plan.inputs, plan.out_dir, plan.store, delegate)
    )


@task(name="make-units")
def make_units(plan: StagePlan, units: list[dict[str, Any]]) -> str:
    """Decode and judge some units for a benchmark that another run finishes; returns the store's folder."""
    sharing.make_units(plan.settings(), plan.inputs, plan.store, units)
    return plan.store


@task(name="report", cache_policy=NO_CACHE)
def report(plan: StagePlan, loss_curves: str, run: Run) -> str:
    """The final report: results, paths of the plots, and how to open the MLflow UI."""
    folder = Path(plan.out_dir)
    table = folder / "table.md"
    manifest = read_manifest(folder)
    pictures = [folder / name for name in manifest.files if name.endswith(".png")]
    pictures.append(Path(loss_curves))
    files = [str(path.resolve()) for path in (table, *pictures)]
    run.update(files=files, metrics=manifest.metrics)  # on the parent, where experiments are compared
    text = table.read_text(encoding="utf-8").strip()
    publish("distill", text, run.link)
    lines = [
        text,
        "",
        "pictures:",
        *(f"  {picture}" for picture in pictures),
        "MLflow:",
        f"  {how_to_open()}",
    ]
    return "\n".join(lines)
