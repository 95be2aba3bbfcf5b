"""`make status`: what runs, where, and what to do."""

from collections.abc import Callable, Mapping
from pathlib import Path

from tabulate import tabulate

from deploy.local import api
from deploy.local.processes import Processes
from deploy.local.services import POOLS, Service, data_folder, services
from deploy.local.settings import Settings
from deploy.local.up import shown


def status(settings: Settings, others: Mapping[str, str], root: Path, say: Callable[[str], None]) -> bool:
    """Show services, work pools, deployments and flow runs in progress; returns whether all is up."""
    processes = Processes(data_folder(settings, root))
    server = api.Server(settings.prefect_url)
    online: dict[str, dict[str, float]] = {}
    wanted = services(settings, others, root)
    has_server = _is_up(wanted[0], processes, {})
    if has_server:
        online = {pool: server.workers_online(pool) if pool in server.pools() else {} for pool in POOLS}
    rows, all_up = [], True
    for service in wanted:
        record = processes.records().get(service.name)
        process = None if record is None else record.process
        healthy = _is_up(service, processes, online)
        all_up &= healthy
        state = "healthy" if healthy else "not running" if process is None else "not healthy"
        since = "" if process is None or record is None else api.ago(record.created)
        log = processes.log(service.name)
        rows.append(
            [
                service.name,
                state,
                "" if process is None else process.pid,
                since,
                service.address,
                shown(log, root) if log.exists() else "",
            ]
        )
    say(tabulate(rows, headers=["service", "state", "pid", "started", "address", "log"]))
    if has_server:
        _tell_about_work(server, online, say)
    say("\nall is up; stop it by make down" if all_up else f"\n{_advice(rows)}")
    return all_up


def _is_up(service: Service, processes: Processes, online: Mapping[str, Mapping[str, float]]) -> bool:
    record = processes.records().get(service.name)
    if record is None or record.process is None:
        return False
    if service.pool is not None:
        return service.address in online.get(service.pool, {})
    return api.answers(service.health)


def _tell_about_work(
    server: api.Server, online: Mapping[str, Mapping[str, float]], say: Callable[[str], None]
) -> None:
    say("")
    for pool, workers in online.items():
        say(f"work pool {pool}: workers online: {', '.join(sorted(workers)) or 'none'}")
    deployments = server.deployments()
    known = ", ".join(sorted(each["full_name"] for each in deployments.values()))
    say(f"deployments: {known or 'none'}")
    runs = server.runs()
    for run in runs:
        deployment = deployments.get(run["deployment_id"], {"full_name": "no deployment"})
        state = run["state_name"].lower()
        say(f"flow run {run['name']!r} ({deployment['full_name']}): {state}, id {run['id']}")
    if not runs:
        say("flow runs in progress: none")


def _advice(rows: list[list[object]]) -> str:
    down = ", ".join(str(row[0]) for row in rows if row[1] == "not running")
    if down:
        return f"not running: {down}; start what is missing by make up"
    ill = ", ".join(str(row[0]) for row in rows if row[1] == "not healthy")
    return f"not healthy: {ill}; if that lasts, look into the logs, then make down and make up"
