"""What all stages' tasks have in common: an MLflow run and a Prefect artifact."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import httpx
from prefect import get_run_logger, runtime
from prefect.artifacts import create_link_artifact, create_markdown_artifact

from dparallel.stages.experiment import StagePlan
from dparallel.stages.files import is_there
from dparallel.stages.lease import LeaseHeldError, wait_until_free
from dparallel.stages.manifest import MANIFEST, Manifest
from dparallel.stages.origin import Origin
from dparallel.stages.progress import duration
from dparallel.stages.storage import exchange
from dparallel.stages.storage.folders import Storage
from tasks.labels import artifact_key, tag_stage
from tasks.tracking.records import LOCAL_UI, Parent, how_to_open
from tasks.tracking.run import Run, track

log = logging.getLogger("dparallel.stage")


def run_tracked(
    plan: StagePlan,
    parent: Parent | None,
    work: Callable[[Run], Manifest],
    home: Path | None = None,
    benchmarks: Iterable[str] = (),
) -> str:
    """Run a stage's work as a run of the tracking server; returns the stage's folder.

    If another run works in the folder, this one waits, and then finds its result or makes it.

    Args:
        parent: the `distill` run; None for a stage that runs by itself.
        work: the library call, which returns immediately if the stage is finished, and raises
            `LeaseHeldError` if another run works in the folder.
        home: the experiment's folder; by default the parent of the stage's folder.
        benchmarks: folders of all benchmarks of the experiment, if the stage is one of them.
    """
    name = " ".join(filter(None, (plan.stage, plan.student, plan.benchmark)))
    home = home or Path(plan.out_dir).parent
    tag_stage(plan.stage, home.name, student=plan.student, benchmark=plan.benchmark)
    with track(
        home,
        plan.stage,
        name,
        plan.config,
        parent,
        plan.out_dir,
        reused=is_finished(plan),
        student=plan.student,
        benchmarks=benchmarks,
    ) as run:
        log.info("%s", name, extra={"stage": name})
        manifest = kept(plan, lambda: when_free(plan.out_dir, lambda: work(run)))
        if manifest.origin.get("flow_run") != origin_of(plan).flow_run and not run.record.reused:
            run.update(reused=True)  # another run made it while this one waited
    log.info("%s", in_a_line(name, plan.out_dir, manifest, run.record.reused), extra={"stage": None})
    publish(home.name, name, summary(name, plan.out_dir, manifest, run.record.reused), run.link)
    return plan.out_dir


def storage_of(plan: StagePlan) -> Storage | None:
    """The store through which machines exchange results; None if there is none."""
    return None if plan.store is None else Storage(plan.store, plan.runs)


def is_finished(plan: StagePlan) -> bool:
    """Whether a stage is finished, here or in the store."""
    storage = storage_of(plan)
    there = storage is not None and storage.manifest(plan.out_dir) is not None
    return there or is_there(Path(plan.out_dir) / MANIFEST)


def kept(plan: StagePlan, work: Callable[[], Manifest]) -> Manifest:
    """Run a stage's work, with its inputs from the store and its result in it, if there is one."""
    storage = storage_of(plan)
    if storage is None:
        return work()
    return exchange.run(storage, plan.out_dir, plan.inputs.values(), work, get_run_logger().info)


def origin_of(plan: StagePlan) -> Origin:
    """The run that a stage belongs to, with the flow run in progress."""
    name = runtime.flow_run.name
    return plan.origin.model_copy(update={"flow_run": name and f"{name} ({runtime.flow_run.id})"})


def when_free(folder: str, work: Callable[[], Manifest]) -> Manifest:
    """Run `work` when no other run works in the folder; it then finds that run's result or makes it."""
    while True:
        wait_until_free(folder, get_run_logger().info)
        try:
            return work()
        except LeaseHeldError:  # another waiting run was faster
            continue


def publish(experiment: str, name: str, markdown: str, link: str | None) -> None:
    """Show the text of a stage or of the whole run in Prefect, with a link to the MLflow run."""
    key, title = artifact_key(experiment, name), f"{experiment}: {name}"
    try:
        create_markdown_artifact(markdown, key=key, description=title)
        if link is not None:
            how = "`make ui` opens it" if link.startswith(LOCAL_UI) else None
            create_link_artifact(link, link_text=f"MLflow: {title}", key=f"{key}-mlflow", description=how)
        else:
            how = f"Run `{name}` of experiment `{experiment}`, in a browser after:\n\n    {how_to_open()}\n"
            create_markdown_artifact(how, key=f"{key}-mlflow", description=f"MLflow: {title}")
    except httpx.HTTPError as error:  # the result does not depend on the server
        log.warning("%s is not shown in Prefect, whose server does not answer (%s)", title, error)


def in_a_line(name: str, folder: str, manifest: Manifest, reused: bool) -> str:
    """What a finished stage made, in one line."""
    took = f"already done, in {folder}" if reused else f"done in {duration(manifest.seconds)}"
    counts = ", ".join(f"{count:,} {key.replace('_', ' ')}" for key, count in manifest.counts.items())
    return f"{name}: {took} ({counts})"


def summary(name: str, folder: str, manifest: Manifest, reused: bool) -> str:
    """A stage's counts and metrics as a Markdown table."""
    rows = [(key, f"{count:,}") for key, count in manifest.counts.items()]
    rows += [(key, f"{value:.4g}") for key, value in manifest.metrics.items()]
    took = "already done, reused" if reused else f"{manifest.seconds:.1f} s"
    lines = [f"## {name}", "", f"`{folder}` ({took})", "", "| | |", "|---|---:|"]
    return "\n".join([*lines, *(f"| {key} | {value} |" for key, value in rows)])
