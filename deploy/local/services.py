"""The servers and workers of an installation: their commands, environments and addresses."""

import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.local import settings as file
from deploy.local.settings import Settings

# Of the shell that starts the servers; they would lead to other servers or stores.
LEFT_OUT = ("PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH", "MLFLOW_TRACKING_URI")
RUNS = "/#/experiments?workflowType=machine_learning"  # MLflow's page of runs; `/` is a page of chat traces
POOLS = ("cpu", "gpu")
WORKER_QUERY_SECONDS = "2"


@dataclass(frozen=True)
class Service:
    """A server, if it has a port, or a worker, if it has a pool.

    Attributes:
        own: the variables that differ from those of the shell.
        setting: the one that gives a server another port.
    """

    name: str
    command: tuple[str, ...]
    own: Mapping[str, str]
    address: str
    port: int | None = None
    setting: str = ""
    health: str = ""
    pool: str | None = None


def services(settings: Settings, others: Mapping[str, str], root: Path) -> list[Service]:
    """Everything that `make up` starts, in this order; `down` ends it in the opposite order.

    Args:
        others: further variables, for all of them.
    """
    workers = [f"cpu-{number + 1}" for number in range(settings.cpu_workers)]
    devices = file.devices_of_workers(settings, {**os.environ, **others})
    return [
        prefect_server(settings, others, root),
        mlflow_server(settings, others, root),
        *(worker(settings, others, root, name, "cpu", settings.cpu_runs, None) for name in workers),
        *(
            worker(settings, others, root, f"gpu-{number + 1}", "gpu", 1, visible)
            for number, visible in enumerate(devices)
        ),
    ]


def data_folder(settings: Settings, root: Path) -> Path:
    return (root / os.path.expanduser(settings.data)).resolve()


def clients(settings: Settings, root: Path) -> dict[str, str]:
    """What commands of Prefect and flows need to reach the servers."""
    found = {"PREFECT_API_URL": f"{settings.prefect_url}/api"}
    if not settings.shares_the_local_store:
        found["MLFLOW_TRACKING_URI"] = settings.mlflow_url
    else:
        found["DPARALLEL_MLFLOW_UI"] = settings.mlflow_url
    return found


def prefect_home(settings: Settings, root: Path) -> dict[str, str]:
    return {
        "PREFECT_HOME": str(data_folder(settings, root) / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }


def prefect_server(settings: Settings, others: Mapping[str, str], root: Path) -> Service:
    own = {**others, **prefect_home(settings, root), "PREFECT_API_URL": f"{settings.prefect_url}/api"}
    own["PREFECT_SERVER_UI_API_URL"] = (
        "/api"  # of the page's own address, from whichever machine it is opened
    )
    if settings.prefect_database:
        own["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = settings.prefect_database
    where = ("--host", settings.host, "--port", str(settings.prefect_port))
    return Service(
        "prefect",
        (sys.executable, "-m", "prefect", "server", "start", *where),
        own,
        settings.prefect_url,
        settings.prefect_port,
        "DPARALLEL_PREFECT_PORT",
        f"{settings.prefect_url}/api/health",
    )


def mlflow_server(settings: Settings, others: Mapping[str, str], root: Path) -> Service:
    # SQLAlchemy's own choice, psycopg, is another package.
    store = re.sub("^postgresql://", "postgresql+psycopg2://", settings.mlflow_store)
    own = {
        **others,
        "MLFLOW_BACKEND_STORE_URI": store,  # may hold a password, so not an argument
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # 13 processes for features that are not used here
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
    }
    if settings.shares_the_local_store:
        files = ("--no-serve-artifacts", "--default-artifact-root", str(root / "mlruns"))
    else:
        folder = settings.mlflow_artifacts or str(data_folder(settings, root) / "artifacts")
        files = ("--serve-artifacts", "--artifacts-destination", folder)
    where = ("--host", settings.host, "--port", str(settings.mlflow_port), "--workers", "1")
    return Service(
        "mlflow",
        (sys.executable, "-m", "mlflow", "server", *where, *files),
        own,
        f"{settings.mlflow_url}{RUNS}",
        settings.mlflow_port,
        "DPARALLEL_MLFLOW_PORT",
        f"{settings.mlflow_url}/health",
    )


def worker(
    settings: Settings,
    others: Mapping[str, str],
    root: Path,
    name: str,
    pool: str,
    runs: int,
    devices: str | None,
) -> Service:
    """A worker of a pool.

    Args:
        runs: how many flow runs it works on at a time.
        devices: its GPUs, as CUDA_VISIBLE_DEVICES.
    """
    own = {**others, **prefect_home(settings, root), **clients(settings, root)}
    own["PREFECT_WORKER_QUERY_SECONDS"] = WORKER_QUERY_SECONDS
    places = [settings.roots or str(root), others.get("DPARALLEL_STORE"), others.get("DPARALLEL_RUNS")]
    own["DPARALLEL_ROOTS"] = ",".join(filter(None, places))
    if settings.threads is not None:
        own["OMP_NUM_THREADS"] = str(settings.threads)
    if devices is not None:
        own["CUDA_VISIBLE_DEVICES"] = devices
    called = f"{socket.gethostname()}-{name}"
    options = ("--pool", pool, "--type", "process", "--limit", str(runs), "--name", called)
    command = (sys.executable, "-m", "flows.worker", *options)
    return Service(name, command, own, called, pool=pool)


def with_programs(variables: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process with these variables; programs of this Python come first."""
    inherited = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {**inherited, **variables, "PATH": programs}
