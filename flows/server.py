"""Prefect's temporary server of a local run: it ends with the run, and only with it."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import prefect
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    get_current_settings,
    temporary_settings,
)

from tasks.launch import ending_with_this_process

RETRIES = 2  # of a request, in 6 s; with Prefect's default of 5, each of a run's last requests takes a minute


@contextlib.contextmanager
def temporary_server() -> Iterator[None]:
    """With the server that Prefect would start where no other one is set; to be called in the main thread.

    Prefect's own one is reached by Ctrl-C in a terminal, so that an interrupted run waits minutes for it, and
    it survives a run that is killed. If it is killed itself, it does not come back, and is not waited for.
    """
    if PREFECT_API_URL.value() is not None:
        yield
        return
    _Server().start()  # from now on Prefect's only instance
    with temporary_settings(set_defaults={PREFECT_CLIENT_MAX_RETRIES: RETRIES}):
        yield


class _Server(SubprocessASGIServer):
    def _run_uvicorn_command(self) -> subprocess.Popen[Any]:
        """The same command as Prefect's, in a session of its own."""
        application = ["--factory", "prefect.server.api.server:create_app"]
        where = ["--app-dir", str(prefect.__module_path__.parent), "--host", "127.0.0.1"]
        settings = get_current_settings().to_environment_variables(exclude_unset=True)
        internal = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
        return subprocess.Popen(
            ending_with_this_process(
                [
                    sys.executable,
                    "-m",
                    "uvicorn",
                    *where,
                    *application,
                    "--port",
                    str(self.port),
                    "--log-level",
                    "error",
                    "--lifespan",
                    "on",
                ]
            ),
            env={**os.environ, **internal, **settings},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
