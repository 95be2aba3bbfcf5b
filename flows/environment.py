"""Prefect with the settings of local runs. Every flow file imports `flow` from here, before anything else.

Prefect reads its settings when it is imported. The prefect command and the workers, which are started from
the project's folder, read the same ones from `prefect.toml`. It also names the file in which `make up` says
where Prefect's server is; MLflow's, which MLflow would not find there, is read here.
"""

import os
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from dparallel.stages.starting import WAITING
from flows.interruption import leave_at_once_until_a_run_begins

SETTINGS = {
    # A flow without a server starts a temporary one; on a busy machine this exceeds Prefect's limit of 20 s.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # Sending usage statistics locks the temporary server's database while the run starts.
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # The library also logs outside of flow runs, which Prefect would warn about.
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    # On a terminal, Prefect says that its client sends usage statistics.
    "DO_NOT_TRACK": "1",
    # MLflow reports the making of its tables.
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}

SERVERS = ".dparallel/servers.toml"  # in the working folder, while `make up` runs


def servers() -> dict[str, str]:
    """Environment variables for the servers of `make up`, if they run."""
    path = Path(os.environ.get("PREFECT_PROFILES_PATH", SERVERS))
    if not path.is_file():
        return {}
    try:
        found: dict[str, str] = tomllib.loads(path.read_text(encoding="utf-8")).get("environment", {})
    except ValueError as error:
        remedy = "run `make up` again, or remove the file to go on without its servers"
        sys.exit(f"error: {path} is damaged ({error}): {remedy}")
    return found


leave_at_once_until_a_run_begins()
for name, value in {**SETTINGS, **WAITING, **servers()}.items():
    os.environ.setdefault(name, value)

import prefect

from dparallel.stages.origin import commit
from dparallel.version import __version__
from flows.logs import send_to_the_run
from flows.progress import show_progress

P = ParamSpec("P")
R = TypeVar("R")


def flow(
    name: str, run_name: Callable[[], str] | None = None
) -> Callable[[Callable[P, R]], prefect.Flow[P, R]]:
    """A decorator like `prefect.flow`; the version is that of the package, with its commit.

    Args:
        run_name: gives the names of runs; by default, their callers do.
    """
    head, changed = commit()["commit"], commit()["uncommitted_changes"]
    version = f"{__version__}+{head[:12]}{'.changed' if changed else ''}" if head else __version__
    return prefect.flow(name=name, flow_run_name=run_name, version=version)


send_to_the_run()
show_progress()
