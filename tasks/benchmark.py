from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dparallel.config.experiment import PromotionConfig
from dparallel.evaluation import plots, sharing
from dparallel.evaluation.cases import STUDENT
from dparallel.evaluation.sharing import Delegate
from dparallel.evaluation.stage import run_stage
from dparallel.evaluation.store import Store
from dparallel.reporting.defaults import write_choices
from dparallel.reporting.headline import headline
from dparallel.reporting.next_steps import next_steps
from dparallel.reporting.read import Benchmark, read_benchmark
from dparallel.reporting.report import report_folder, write_report
from dparallel.stages.experiment import StagePlan
from dparallel.stages.generation_file import GENERATION
from dparallel.stages.manifest import read_manifest
from dparallel.stages.metrics_log import METRICS
from dparallel.stages.storage import exchange
from dparallel.stages.storage.folders import Storage
from tasks.retries import resumable_task
from tasks.stages import is_older, manifest_of, origin_of, publish, run_tracked, storage_of
from tasks.tracking.content import effort
from tasks.tracking.links import how_to_open
from tasks.tracking.records import Parent, Promotion
from tasks.tracking.run import Run


@resumable_task("run-benchmark", "benchmark {plan.benchmark}")
def run_benchmark(
    plan: StagePlan,
    parent: Parent | None = None,
    delegate: Delegate | None = None,
    promotion: Promotion | None = None,
) -> str:
    """Measure teacher and students, in this process or with `delegate`; returns the stage's folder.

    Args:
        promotion: what decides on the aliases of models when the stage is finished; None if the run that it
            belongs to does so.
    """
    storage = storage_of(plan)
    if storage is not None:
        if promotion is not None:
            exchange.pull_stages(storage, set(promotion.benchmarks) - {plan.out_dir})
        if delegate is not None:
            delegate = exchange.bringing(delegate, storage)
    store = Store(plan.measurements, storage)
    folder = run_tracked(
        plan,
        parent,
        lambda run: run_stage(plan.settings(), plan.inputs, plan.out_dir, store, delegate, origin_of(plan)),
        promotion=promotion,
    )
    set_defaults(plan)
    return folder


def set_defaults(plan: StagePlan) -> None:
    """Make what a finished benchmark chose the decode defaults of the students, here and in the store."""
    if not plan.sets_defaults:
        return
    name = plan.benchmark or "benchmark"
    changed = write_choices(read_benchmark(name, plan.out_dir, plan.measurements, models=plan.inputs))
    if (storage := storage_of(plan)) is not None:
        for folder in filter(storage.holds, changed):
            storage.push_files(Path(folder), [GENERATION], {})


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
def report(
    home: Path, plans: list[StagePlan], others: list[StagePlan], run: Run, promotion: PromotionConfig
) -> str:
    """The final report: tables, pictures, merged models, next commands, and how to open report and MLflow.

    Args:
        home: the experiment's folder.
        plans: the finished benchmark stages, of the same models.
        others: the other finished stages.
        run: the experiment's own run, on which experiments are compared.
        promotion: when a student becomes the champion in MLflow's registry.
    """
    trained = [plan for plan in others if plan.stage == "training"]
    if (storage := storage_of(plans[0])) is not None:
        _pull(storage, [*plans, *trained])
        for plan in plans:
            set_defaults(plan)
    stages = [(plan.benchmark or "benchmark", Path(plan.out_dir)) for plan in plans]
    models = {name: path for plan in plans for name, path in plan.inputs.items()}
    folder = report_folder(home, stages)
    report_files = write_report(home.name, stages, plans[0].measurements, models, folder)
    curves = folder / "loss_curves.png"
    plots.loss_curves({plan.student or "": Path(plan.out_dir) / METRICS for plan in trained}, curves)

    benchmarks = [read_benchmark(*stage, plans[0].measurements, models=models) for stage in stages]
    tables = [stage / "table.md" for _, stage in stages]
    pictures = [
        benchmark.folder / file
        for benchmark in benchmarks
        for file in benchmark.manifest.files
        if file.endswith(".png")
    ]
    text = "\n\n".join(table.read_text(encoding="utf-8").strip() for table in tables)
    uploaded = [*report_files, curves]
    if len(stages) == 1:
        uploaded += [*tables, *pictures]
    else:  # whose files have equal names
        text = (folder / "report.md").read_text(encoding="utf-8").strip()
    made = made_by([*others, *plans], run.record.started)
    run.update(
        files=[str(path.resolve()) for path in uploaded],
        metrics={**numbers(benchmarks), **{key: value for _, _, more in made for key, value in more.items()}},
        note=f"{text}\n\n{stages_table(made)}",
        tags={**run.record.tags, "default_student": default_students(benchmarks)},
        stages=[str(Path(plan.out_dir).resolve()) for plan in (*others, *plans)],
        reused=all(reused for _, reused, _ in made),
        promotion=Promotion(benchmarks=[str(stage.resolve()) for _, stage in stages], settings=promotion),
    )
    publish(home.name, "distill", text, run)
    lines = [
        text,
        "",
        "pictures:",
        *(f"  {picture}" for picture in (*pictures, curves)),
        *next_steps(benchmarks[0], home.parent),
        "report:",
        f"  {folder / 'report.html'}",
        "MLflow:",
        *(f"  {line}" for line in how_to_open(run.record, run.experiment_id)),
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


def numbers(benchmarks: list[Benchmark]) -> dict[str, float]:
    """Metrics of an experiment: those of its benchmarks; of several ones, after the benchmark's name."""
    found: dict[str, float] = {}
    for benchmark in benchmarks:
        prefix = f"{benchmark.name}/" if len(benchmarks) > 1 else ""
        head = {f"headline/{name}": value for name, value in headline(benchmark).items()}
        found |= {f"{prefix}{name}": value for name, value in (benchmark.manifest.metrics | head).items()}
    return found


def default_students(benchmarks: list[Benchmark]) -> str:
    """The default student of each benchmark, once if all have the same."""
    names = {each.name: (each.default_student or "none").removeprefix(STUDENT) for each in benchmarks}
    if len(set(names.values())) == 1:
        return next(iter(names.values()))
    return ", ".join(f"{benchmark}: {student}" for benchmark, student in names.items())


def made_by(plans: list[StagePlan], started: int) -> list[tuple[str, bool, dict[str, float]]]:
    """Of each stage: its name, whether it was finished before, and its wall seconds and tokens as metrics."""
    found = []
    for plan in plans:
        name = " ".join(filter(None, (plan.stage, plan.student, plan.benchmark)))
        manifest = manifest_of(plan)
        spent = effort(manifest, Path(plan.out_dir))
        metrics = {f"{what}/{name}": value for what, value in spent.items()}
        found.append((name, is_older(manifest, started), metrics))
    seconds = sum(metrics[f"seconds/{name}"] for name, reused, metrics in found if not reused)
    return [*found, ("together", not seconds, {"seconds": seconds})]


def stages_table(made: list[tuple[str, bool, dict[str, float]]]) -> str:
    """The stages of an experiment as a Markdown table."""
    lines = ["| stage | seconds | tokens | |", "|---|---:|---:|---|"]
    for name, reused, metrics in made[:-1]:
        tokens = metrics.get(f"tokens/{name}")
        cells = [name, f"{metrics[f'seconds/{name}']:.1f}", "" if tokens is None else f"{tokens:,.0f}"]
        lines.append(f"| {' | '.join(cells)} | {'reused' if reused else ''} |")
    return "\n".join(lines)
