"""What all stages' tasks have in common: an MLflow run and a Prefect artifact."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
from prefect import get_run_logger, runtime
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.settings import PREFECT_API_URL

from dparallel.config.base import UserError
from dparallel.models.checkpoints import read_config
from dparallel.stages.experiment import Experiment, StagePlan
from dparallel.stages.files import is_there
from dparallel.stages.lease import LeaseHeldError, wait_until_free
from dparallel.stages.manifest import MANIFEST, Manifest, read_manifest
from dparallel.stages.origin import Origin
from dparallel.stages.progress import duration
from dparallel.stages.storage import exchange
from dparallel.stages.storage.folders import Storage
from tasks.labels import artifact_key, tag_stage
from tasks.tracking import describe, links
from tasks.tracking.records import Parent, Promotion
from tasks.tracking.run import Run, track

log = logging.getLogger("dparallel.stage")


def run_tracked(
    plan: StagePlan,
    parent: Parent | None,
    work: Callable[[Run], Manifest],
    home: Path | None = None,
    promotion: Promotion | None = None,
) -> str:
    """Run a stage's work as a run of the tracking server; returns the stage's folder.

    If another run works in the folder, this one waits, and then finds its result or makes it.

    Args:
        parent: the `distill` run; None for a stage that runs by itself.
        work: the library call, which returns immediately if the stage is finished, and raises
            `LeaseHeldError` if another run works in the folder.
        home: the experiment's folder; by default the parent of the stage's folder.
        promotion: what decides on the aliases of models when the stage is finished.
    """
    name = " ".join(filter(None, (plan.stage, plan.student, plan.benchmark)))
    home = home or Path(plan.out_dir).parent
    tag_stage(plan.stage, home.name, student=plan.student, benchmark=plan.benchmark)
    folder = Path(plan.out_dir)
    there = is_finished(plan)
    with track(
        home,
        plan.stage,
        name if parent else describe.run_name(home.name, [name], plan.origin.overrides),
        plan.config,
        parent,
        plan.out_dir,
        monitored=not there,
        student=plan.student,
        inputs={key: str(Path(path).resolve()) for key, path in plan.inputs.items()},
        params=describe.stage_parameters(plan),
        tags={
            **describe.origin_tags(plan.origin),
            **describe.stage_tags(plan, family_of(plan.inputs.get("teacher"))),
            **prefect_tags(),
        },
        promotion=promotion and promotion.here(),
        reused=there,
    ) as run:
        log.info("%s", name, extra={"stage": name})
        manifest = kept(plan, lambda: when_free(plan.out_dir, lambda: work(run)))
        waited = not there and manifest.origin.get("flow_run") != origin_of(plan).flow_run
        reused = waited or (there and is_older(manifest, run.record.started))  # otherwise judged anew
        table = folder / "table.md"
        note = table.read_text(encoding="utf-8") if plan.stage == "benchmark" and table.is_file() else ""
        run.record = run.record.model_copy(
            update={"reused": reused, "note": note or summary(name, plan.out_dir, manifest, reused)}
        )
    log.info("%s", in_a_line(name, plan.out_dir, manifest, reused), extra={"stage": None})
    publish(home.name, name, summary(name, plan.out_dir, manifest, reused), run)
    return plan.out_dir


def storage_of(plan: StagePlan) -> Storage | None:
    """The store through which machines exchange results; None if there is none."""
    return None if plan.store is None else Storage(plan.store, plan.runs)


def is_finished(plan: StagePlan) -> bool:
    """Whether a stage is finished, here or in the store."""
    storage = storage_of(plan)
    there = storage is not None and storage.manifest(plan.out_dir) is not None
    return there or is_there(Path(plan.out_dir) / MANIFEST)


def manifest_of(plan: StagePlan) -> Manifest:
    """Manifest of a finished stage, here or in the store; StageError if it is not finished."""
    storage = storage_of(plan)
    there = storage.manifest(plan.out_dir) if storage is not None else None
    return there or read_manifest(plan.out_dir)


def kept(plan: StagePlan, work: Callable[[], Manifest]) -> Manifest:
    """Run a stage's work, with its inputs from the store and its result in it, if there is one."""
    storage = storage_of(plan)
    if storage is None:
        return work()
    return exchange.run(storage, plan.out_dir, plan.inputs.values(), work, get_run_logger().info)


def track_experiment(experiment: Experiment) -> AbstractContextManager[Run]:
    """The run of a whole experiment, below which its stages are."""
    config, overrides = experiment.config, experiment.snapshot.overrides
    origin = Origin(config=experiment.snapshot.config, overrides=overrides)
    return track(
        experiment.folder,
        "distill",
        describe.run_name(config.name, config.students, overrides),
        config.model_dump(mode="json"),
        params=describe.parameters(config, overrides),
        tags={
            **describe.origin_tags(origin),
            **describe.experiment_tags(config, family_of(experiment.trajectories().inputs["teacher"])),
            **prefect_tags(),
        },
    )


def is_older(manifest: Manifest, started: int) -> bool:
    """Whether a stage was finished before a run started (milliseconds since 1970)."""
    return (manifest.finished.timestamp() + 1) * 1000 <= started


def family_of(teacher: str | None) -> str | None:
    """The family of a checkpoint; None if there is no such checkpoint yet."""
    if teacher is None:
        return None
    try:
        return str(read_config(teacher).family)
    except UserError:
        return None


def prefect_tags() -> dict[str, str]:
    """Tags that lead to the flow run in progress."""
    if runtime.flow_run.id is None:
        return {}
    tags = {"prefect_run": f"{runtime.flow_run.name} ({runtime.flow_run.id})"}
    served = PREFECT_API_URL.value() is not None  # a temporary server has no pages
    return {**tags, "prefect_run_url": str(runtime.flow_run.ui_url)} if served else tags


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


def publish(experiment: str, name: str, markdown: str, run: Run) -> None:
    """Show the text of a stage or of the whole run in Prefect, with a link to the MLflow run."""
    key, title = artifact_key(experiment, name), f"{experiment}: {name}"
    command = links.ui_command(run.record.tracking_uri)
    needed = links.needs_a_server(run.record.tracking_uri)
    try:
        create_markdown_artifact(markdown, key=key, description=title)
        if run.link is not None:
            how = f"After `{command}`, or `make ui` in the project's folder" if needed else None
            create_link_artifact(run.link, link_text=f"MLflow: {title}", key=f"{key}-mlflow", description=how)
        else:
            opened = "\n".join(f"    {line}" for line in links.how_to_open(run.record))
            how = f"Run `{name}` of experiment `{experiment}`, in a browser:\n\n{opened}\n"
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
