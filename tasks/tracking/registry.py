"""MLflow's model registry: merged models are versions of `<experiment>-<student>`.

A version is registered by the merging stage. It gets the alias `candidate` when all benchmarks of the
experiment have shown that the student keeps the teacher's accuracy.
"""

import logging

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

log = logging.getLogger("dparallel.tracking")

ALIAS = "candidate"
FINGERPRINT = "fingerprint"  # tag of a version: fingerprint of the merging stage


def register(client: MlflowClient, run_id: str, model: str, fingerprint: str) -> None:
    """Register a new version of `model`, unless one has the same files."""
    if _versions(client, model, fingerprint):
        return
    try:
        client.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"{client.get_run(run_id).info.artifact_uri}/model"
    client.create_model_version(model, source, run_id, tags={FINGERPRINT: fingerprint})


def nominate(client: MlflowClient, model: str, fingerprint: str) -> None:
    """Give the alias `candidate` to the version of `model` with this fingerprint."""
    measured = _versions(client, model, fingerprint)
    if not measured:
        log.warning("%s: the version that keeps the accuracy is not registered in this store", model)
        return
    newest = max(measured, key=lambda version: int(version.version))
    client.set_registered_model_alias(model, ALIAS, newest.version)


def _versions(client: MlflowClient, model: str, fingerprint: str) -> list[ModelVersion]:
    versions = client.search_model_versions(f"name = '{model}'")
    return [version for version in versions if version.tags.get(FINGERPRINT) == fingerprint]
