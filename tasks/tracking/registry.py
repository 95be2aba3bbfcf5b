"""MLflow's model registry: a merged model is a version of `<experiment>-<student>`."""

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

ALIAS = "candidate"


def register(client: MlflowClient, run_id: str, model: str) -> None:
    """A new version of the registered `model`, once per run; the newest carries the alias."""
    if client.search_model_versions(f"run_id = '{run_id}'"):
        return
    try:
        client.get_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(model)
    source = f"{client.get_run(run_id).info.artifact_uri}/model"
    version = client.create_model_version(model, source, run_id)
    client.set_registered_model_alias(model, ALIAS, version.version)
