"""`make down`: stop flow runs, workers and servers, in this order, and nothing that others started."""

import contextlib
import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from deploy.local import api
from deploy.local.processes import Processes, Record, stop
from deploy.local.services import data_folder
from deploy.local.settings import Settings
from deploy.local.up import remove_servers

CANCEL_SECONDS = 60.0  # for workers to end flow runs in progress
EVERY_SECONDS = 10.0
MESSAGE = "stopped by make down"
PART = "part"  # tag of deployments, in prefect.yaml, that only other flow runs start


def down(settings: Settings, root: Path, say: Callable[[str], None]) -> None:
    """Stop everything that `up` started, and let commands in `root` work without servers again."""
    data = data_folder(settings, root)
    processes = Processes(data)
    records = processes.records()
    if not any(record.members() for record in records.values()):
        for name in records:
            processes.forget(name)
        remove_servers(root)
        say("nothing is running")
        return
    workers = [record for name, record in records.items() if name not in ("prefect", "mlflow")]
    server = api.Server(settings.prefect_url)
    stopped: list[dict[str, Any]] = []
    if "prefect" in records and records["prefect"].process is not None:
        try:
            _cancel(server, stopped, workers, say)
        except httpx.HTTPError as error:  # processes are ended all the same
            say(f"prefect does not answer ({error}): states of flow runs may be wrong")
    _end("workers", workers, say)
    for run in stopped:
        with contextlib.suppress(httpx.HTTPError):
            if _in_progress(server, [run["id"]]):
                server.set_state(run["id"], "CANCELLED", MESSAGE)
    for name in ("mlflow", "prefect"):
        if name in records:
            _end(name, [records[name]], say)
    for name in records:
        processes.forget(name)
    remove_servers(root)
    say("all is stopped")
    commands = list(dict.fromkeys(command for run in stopped if (command := run["command"])))
    if commands:
        say("what the runs finished is kept; to go on: make up, then")
        for command in commands:
            say(f"  {command}")


def _cancel(
    server: api.Server, stopped: list[dict[str, Any]], workers: list[Record], say: Callable[[str], None]
) -> None:
    """Cancel flow runs in progress on workers, and wait for them; `stopped` gets them and their `command`.

    Their processes end within seconds; that workers report it half a minute later is not waited for.
    """
    deployments = server.deployments()
    found = server.runs()
    ours = [run for run in found if run["deployment_id"] in deployments]
    for run in found:
        if run not in ours and not run["parent_task_run_id"]:
            say(
                f"flow run {run['name']!r} is running in a terminal of its own, and loses its server: what "
                "it has finished is kept, and the same command goes on"
            )
    for run in ours:
        deployment = deployments[run["deployment_id"]]
        run["command"] = command_of(run, deployment)
        say(f"stopping flow run {run['name']!r} of {deployment['full_name']}")
        stopped.append(run)
        server.set_state(run["id"], "CANCELLING", MESSAGE)
    begin = told = time.monotonic()
    had_processes = _flow_runs(workers) > 0
    while left := _in_progress(server, [run["id"] for run in ours]):
        now = time.monotonic()
        if now - begin > CANCEL_SECONDS or (had_processes and not _flow_runs(workers)):
            break
        if now - told > EVERY_SECONDS:
            told = now
            say(f"waiting for {len(left)} flow runs to stop ({now - begin:.0f} s)")
        time.sleep(1)


def _flow_runs(workers: list[Record]) -> int:
    """The number of processes that workers have started."""
    return sum(len(record.members()) - (record.process is not None) for record in workers)


def _in_progress(server: api.Server, ids: list[str]) -> list[dict[str, Any]]:
    if not ids:
        return []
    return [run for run in server.runs(ids) if run["state_type"] in api.IN_PROGRESS]


def command_of(run: dict[str, Any], deployment: dict[str, Any]) -> str | None:
    """The command that goes on with a flow run; None if another flow run started it."""
    parameters = run["parameters"]
    if parameters.get("parent") or PART in deployment["tags"]:
        return None
    words = ["prefect", "deployment", "run", deployment["full_name"], "--watch"]
    for name, value in parameters.items():
        if value != deployment["parameters"].get(name):
            words += ["--param", f"{name}={_as_parameter(value)}"]
    return shlex.join(words)


def _as_parameter(value: Any) -> str:
    """A value as Prefect's command reads it: JSON, or a text that is none and has nothing to escape."""
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) and text == f'"{value}"' and not value.startswith("{"):
        try:
            json.loads(value)
        except ValueError:
            return value
    return text


def _end(what: str, records: list[Record], say: Callable[[str], None]) -> None:
    if any(record.members() for record in records):
        say(f"stopping {what}")
        stop(records)
