"""Where MLflow shows runs: addresses of its pages, and the command that serves a store without a server.

Every link and every command that is printed comes from here.
"""

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from tasks.tracking.records import SQLITE, Record, tracking_uri, without_password

HOST, PORT = "127.0.0.1", 5000
TRAINING = "workflowType=machine_learning"  # otherwise MLflow opens a page of chat traces
VIEW = "dparallel"  # key of the columns that `tasks.tracking.view` gives an experiment


def runs_page(server: str, experiment_id: str | None = None) -> str:
    """Page of the runs of an experiment, with the columns of its view; by default of all experiments."""
    if experiment_id is None:
        return f"{server}/#/experiments?{TRAINING}"
    return f"{server}/#/experiments/{experiment_id}/runs?{TRAINING}&viewStateShareKey={VIEW}"


def run_page(server: str, experiment_id: str, run_id: str) -> str:
    """Page of a run."""
    return f"{server}/#/experiments/{experiment_id}/runs/{run_id}?{TRAINING}"


def server_of(uri: str) -> str:
    """Address of the server of a store, or of the one that shows a store without a server."""
    if uri.startswith("http"):
        return without_password(uri)
    return os.environ.get("DPARALLEL_MLFLOW_UI", f"http://{HOST}:{PORT}")  # `make up` sets it


def needs_a_server(uri: str) -> bool:
    """Whether a server must be started before a page of this store can be opened."""
    return not uri.startswith("http") and "DPARALLEL_MLFLOW_UI" not in os.environ


def how_to_open(of: Record | None = None, experiment_id: str | None = None) -> list[str]:
    """Lines that say how to open the runs in a browser: a command if one is needed, and the page."""
    uri = tracking_uri(of)
    page = runs_page(server_of(uri), experiment_id)
    return [ui_command(uri), page] if needs_a_server(uri) else [page]


def ui_command(uri: str) -> str:
    """The command that shows a store without a server, in any folder."""
    return shlex.join([sys.executable, "-m", "tasks.tracking", "ui", "--store", without_password(uri)])


def upload_command(folder: Path) -> str:
    """The command that uploads what waits below a folder."""
    return shlex.join(["python", "-m", "tasks.tracking", "upload", str(folder)])


def server_command(uri: str, port: int) -> tuple[list[str], Mapping[str, str]]:
    """MLflow's server for a store, in two processes; and the environment that it takes."""
    folder = Path(uri.removeprefix(SQLITE)).parent if uri.startswith(SQLITE) else Path.cwd()
    where = ["--host", HOST, "--port", str(port), "--workers", "1"]
    files = ["--no-serve-artifacts", "--default-artifact-root", str(folder / "mlruns")]
    environment = {
        "MLFLOW_BACKEND_STORE_URI": uri,  # may hold a password, so not an argument
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # 13 processes for features that are not used here
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    return [sys.executable, "-m", "mlflow", "server", *where, *files], environment
