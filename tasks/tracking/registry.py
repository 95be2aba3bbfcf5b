"""MLflow's model registry: merged models are versions of the registered model `<experiment>`.

A version is registered by the merging stage. Aliases are set when all benchmarks of the experiment are
finished: `candidate` for the default student, and `champion` if it passes the gate of `promotion`.
"""

import contextlib
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from dparallel.config.decoding import DecodingConfig
from dparallel.stages.manifest import Manifest
from tasks.tracking.models import log_model, set_decoding
from tasks.tracking.promotion import (
    CANDIDATE,
    CHAMPION,
    Evidence,
    Undecided,
    beats_champion,
    beats_teacher,
    nominated,
)
from tasks.tracking.records import Promotion, Record, now

log = logging.getLogger("dparallel.tracking")

FINGERPRINT = "fingerprint"  # tag of a version: fingerprint of the merging stage
BENCHMARK_RUN = "benchmark_run"  # tag of a version: the run with its evidence
MODEL = "logged_model"  # tag of a version: id of the logged model with its files and metrics
EVIDENCE = "promotion"  # folder of the evidence in that run
ON_VERSIONS = ("student", "family", "teacher", "commit")  # tags of the run


def register(
    client: MlflowClient, experiment_id: str, run_id: str, record: Record, manifest: Manifest
) -> None:
    """Log the merged model of a run, and register it as a new version unless one has the same files."""
    if _versions(client, record.experiment, manifest.fingerprint):
        return
    model = log_model(client, experiment_id, run_id, record, manifest)
    name = record.experiment
    about = f"Merged students of the experiment `{name}`; `@{CHAMPION}` and `@{CANDIDATE}` are set by it."
    try:
        client.create_registered_model(name, description=about)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {key: record.tags[key] for key in ON_VERSIONS if key in record.tags}
    client.create_model_version(
        name,
        model.artifact_location,
        run_id,
        tags={**tags, FINGERPRINT: manifest.fingerprint, MODEL: model.model_id},
        description=f"Student `{record.student}`; not measured yet.",
        model_id=model.model_id,  # a server refuses files that are not those of this model or the run
    )


def promote(client: MlflowClient, run_id: str, record: Record, promotion: Promotion) -> None:
    """Set aliases as the benchmarks say; the reason is logged and is in the tags of the run."""
    reasons = _decide(client, run_id, record.experiment, promotion)
    for alias, reason in reasons.items():
        client.set_tag(run_id, alias, reason)
    line = "; ".join(f"{alias} {reason}" for alias, reason in reasons.items())
    log.info("model %s: %s", record.experiment, line, extra={"stage": None})


def _decide(client: MlflowClient, run_id: str, model: str, promotion: Promotion) -> dict[str, str]:
    """Set the aliases; returns for each whether it was set, and why."""
    try:
        found = nominated(promotion.benchmarks)
        version = _version_of(client, model, found[0])
    except Undecided as reason:
        return dict.fromkeys((CANDIDATE, CHAMPION), f"not set: {reason}")
    _note(client, run_id, version, found)
    client.set_registered_model_alias(model, CANDIDATE, version.version)
    named = f"version {version.version}, student {found[0].student}"
    reasons = {CANDIDATE: f"set: {named}, is the default student"}
    passes, why = beats_teacher(found, promotion.settings)
    champion = _champion(client, model)
    is_champion = champion is not None and champion.version == version.version
    if not passes:
        reasons[CHAMPION] = f"{'kept, though' if is_champion else 'not set:'} {named}, is {why}"
    elif is_champion:
        reasons[CHAMPION] = f"kept: {named}"
    else:
        if champion is not None:
            passes, why = beats_champion(found, _evidence_on(client, champion), promotion.settings)
            why = f"against version {champion.version}: {why}"
        if passes:
            client.set_registered_model_alias(model, CHAMPION, version.version)
        reasons[CHAMPION] = f"{'set' if passes else 'not set'}: {named}, {why}"
    return reasons


def _version_of(client: MlflowClient, model: str, found: Evidence) -> ModelVersion:
    """The newest version with the measured model's files."""
    measured = _versions(client, model, found.fingerprint)
    if not measured:
        raise Undecided(f"the measured model of {found.student} is not registered in this store")
    newest: ModelVersion = max(measured, key=lambda version: int(version.version))
    return newest


def _versions(client: MlflowClient, model: str, fingerprint: str) -> list[ModelVersion]:
    versions = client.search_model_versions(f"name = '{model}'")
    return [version for version in versions if version.tags.get(FINGERPRINT) == fingerprint]


def _champion(client: MlflowClient, model: str) -> ModelVersion | None:
    number = client.get_registered_model(model).aliases.get(CHAMPION)
    return None if number is None else client.get_model_version(model, str(number))


def _note(client: MlflowClient, run_id: str, version: ModelVersion, found: Sequence[Evidence]) -> None:
    """Keep the evidence with the run, and link the version to it, with its numbers and its decoding."""
    with tempfile.TemporaryDirectory() as scratch:
        for one in found:
            file = Path(scratch) / f"{one.benchmark}.json"
            file.write_text(one.model_dump_json(indent=1), encoding="utf-8")
            client.log_artifact(run_id, str(file), EVIDENCE)
    numbers = {
        f"{one.benchmark}/{name}": float(getattr(one, name))
        for one in found
        for name in ("accuracy", "nfe", "teacher_accuracy", "teacher_nfe")
    }
    client.set_model_version_tag(version.name, version.version, BENCHMARK_RUN, run_id)
    for key, value in numbers.items():
        client.set_model_version_tag(version.name, version.version, key.replace("/", "."), f"{value:.6g}")
    lines = [
        f"{one.benchmark}: accuracy {one.accuracy:.1%} at NFE {one.nfe:.1f}; teacher "
        f"{one.teacher_accuracy:.1%} at NFE {one.teacher_nfe:.1f}"
        for one in found
    ]
    experiment = client.get_run(run_id).info.experiment_id
    about = (
        f"Student `{found[0].student}`. {'. '.join(lines)}. "
        f"Measured by [this run](#/experiments/{experiment}/runs/{run_id})."
    )
    client.update_model_version(version.name, version.version, about)
    model_id = version.tags[MODEL]
    chosen = {"benchmark": found[0].benchmark, "split": "validation"}
    set_decoding(client, model_id, DecodingConfig(**found[0].decoding), chosen)
    at = now()
    metrics = [Metric(key, value, at, 0, model_id=model_id, run_id=run_id) for key, value in numbers.items()]
    client.log_batch(run_id, metrics=metrics)


def _evidence_on(client: MlflowClient, champion: ModelVersion) -> dict[str, Evidence]:
    """The evidence on the champion by benchmark; empty if its run is gone."""
    run_id = champion.tags.get(BENCHMARK_RUN)
    found = {}
    if run_id is not None:
        with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(MlflowException):
            for file in client.list_artifacts(run_id, EVIDENCE):
                path = Path(client.download_artifacts(run_id, file.path, scratch))
                one = Evidence.model_validate_json(path.read_text(encoding="utf-8"))
                found[one.benchmark] = one
    return found
