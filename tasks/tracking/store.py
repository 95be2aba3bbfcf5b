"""The store of the runs: the run of a record is found by the record's id, or created below its parent's."""

import os
import re
import socket
from pathlib import Path

# A server that is not available must not delay stages: time out after seconds instead of MLflow's minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from dparallel.config.base import ConfigError
from dparallel.config.roots import ROOTS, check_path, roots
from tasks.tracking.database import make_database
from tasks.tracking.links import run_page, server_of
from tasks.tracking.records import SQLITE, Parent, Record, StoreError, tracking_uri, without_password
from tasks.tracking.view import experiment_tags

RECORD_TAG = "record"
STAGE_KEY = "stage_key"  # tag with the name of the stage's folder
PARENT = "mlflow.parentRunId"
SERVER = re.compile(r"(https?|(postgresql|mysql|mssql)(\+\w+)?)://")  # stores that are no files


class TrackingError(RuntimeError):
    """The store cannot accept a run; the message names the remedy."""


def client_of(record: Record) -> MlflowClient:
    """A client of the record's store."""
    uri = tracking_uri(record)
    make_database(uri)
    return MlflowClient(tracking_uri=uri)


def check_store(parent: Parent) -> None:
    """Check that runs of this process go to the store of the parent, as far as that can be told.

    One store may have several addresses, so an address that differs is asked for the parent's run.

    Raises:
        StoreError: they do not.
        ConfigError: the parent's is a file outside of the folders that runs may use on this worker.
    """
    if parent.tracking_uri != without_password(tracking_uri()):
        _check_allowed(parent.tracking_uri)
    uri = tracking_uri(parent)
    file = Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None
    if without_password(uri) == parent.tracking_uri:
        if file is not None and parent.host != socket.gethostname() and not file.exists():
            raise StoreError(
                f"the run {parent.name!r} is recorded in {uri}, a file of {parent.host}, which this machine "
                f"({socket.gethostname()}) does not have: start `mlflow server` there, and set "
                "MLFLOW_TRACKING_URI to its address for all commands and workers"
            )
        return
    if file is not None and not file.exists():
        raise _other_store(parent, uri)
    if parent.run_id is not None:
        try:
            MlflowClient(tracking_uri=uri).get_run(parent.run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise _other_store(parent, uri) from error
        except Exception:  # not available now; the upload finds out
            return


def _check_allowed(uri: str) -> None:
    """Raise a ConfigError if the store is a file outside of the folders that runs may use on this worker."""
    if not roots() or SERVER.match(uri):
        return
    if not uri.startswith(SQLITE) or set("?#%") & set(uri):
        raise ConfigError(
            f"parent.tracking_uri={uri}: give the address of a server, or {SQLITE}/FOLDER/mlflow.db: a "
            f"worker with {ROOTS} takes no other form"
        )
    check_path("parent.tracking_uri", uri.removeprefix(SQLITE))


def _other_store(parent: Parent, uri: str) -> StoreError:
    return StoreError(
        f"MLFLOW_TRACKING_URI is {without_password(uri)}, and the run {parent.name!r} that this stage "
        f"belongs to is in {parent.tracking_uri}: set the variable to that store, or unset it: the run "
        "hands its store on"
    )


def experiment_of(client: MlflowClient, record: Record) -> str:
    """Id of a record's experiment, which is created if need be, and opens as `view` says."""
    wanted = experiment_tags(record.experiment)
    experiment = client.get_experiment_by_name(record.experiment)
    if experiment is None:
        try:
            return client.create_experiment(record.experiment, tags=wanted)
        except MlflowException as error:
            experiment = client.get_experiment_by_name(record.experiment)
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or experiment is None:
                raise  # otherwise another run was faster
    if experiment.lifecycle_stage == "deleted":
        uri = without_password(tracking_uri(record))
        raise TrackingError(
            f"experiment {record.experiment!r} is deleted there; restore it: MLFLOW_TRACKING_URI={uri} "
            f"mlflow experiments restore -x {experiment.experiment_id}"
        )
    if experiment.tags.get("mlflow.note.content"):  # which somebody may have written
        del wanted["mlflow.note.content"]
    for key, value in wanted.items():
        if experiment.tags.get(key) != value:
            client.set_experiment_tag(experiment.experiment_id, key, value)
    return experiment.experiment_id


def run_of(client: MlflowClient, experiment_id: str, record: Record) -> str:
    """The MLflow run of a record; created (after its parent's) if it does not exist."""
    if begun := found(client, experiment_id, record.id):
        return begun
    tags = {RECORD_TAG: record.id, "stage": record.stage, "reused": str(record.reused).lower()}
    if record.folder is not None:
        tags[STAGE_KEY] = Path(record.folder).name
    if record.parent is not None:
        tags[PARENT] = parent_of(client, experiment_id, record, record.parent)
    # A reused stage has a run of its own only in a store that lacks the run that made it.
    name = f"{record.name} (reused)" if record.reused else record.name
    return client.create_run(experiment_id, record.started, {**record.tags, **tags}, name).info.run_id


def parent_of(client: MlflowClient, experiment_id: str, record: Record, parent: Parent) -> str:
    """The run of a record's parent; created if the parent could not do so itself yet."""
    if begun := found(client, experiment_id, parent.record):
        return begun
    uri = tracking_uri(record)
    if without_password(uri) != parent.tracking_uri:
        raise _other_store(parent, uri)
    tags = {RECORD_TAG: parent.record, "stage": "distill", "reused": "false"}
    return client.create_run(experiment_id, parent.started, tags, parent.name).info.run_id


def found(client: MlflowClient, experiment_id: str, record: str) -> str | None:
    """The run of a record."""
    runs = client.search_runs([experiment_id], f"tags.{RECORD_TAG} = '{record}'", max_results=1)
    return runs[0].info.run_id if runs else None


def maker_of(client: MlflowClient, experiment_id: str, record: Record) -> Run | None:
    """The finished run that made the stage of a record; None if the store does not have it."""
    return _other_of(client, experiment_id, record, "attributes.status = 'FINISHED'")


def twin_of(client: MlflowClient, experiment_id: str, record: Record) -> Run | None:
    """A run in progress that made the stage of a record, and has not uploaded it yet."""
    return _other_of(client, experiment_id, record, "attributes.status = 'RUNNING' and tags.reused = 'false'")


def _other_of(client: MlflowClient, experiment_id: str, record: Record, condition: str) -> Run | None:
    """The first other run of the stage of a record, of those with a condition."""
    if record.folder is None:
        return None
    same = f"tags.{STAGE_KEY} = '{Path(record.folder).name}' and tags.{RECORD_TAG} != '{record.id}'"
    runs = client.search_runs(
        [experiment_id], f"{same} and {condition}", max_results=1, order_by=["start_time ASC"]
    )
    return runs[0] if runs else None


def page(record: Record, experiment_id: str, run_id: str) -> str:
    """Address of a run on the tracking server, or on the UI of a local store."""
    return run_page(server_of(tracking_uri(record)), experiment_id, run_id)
