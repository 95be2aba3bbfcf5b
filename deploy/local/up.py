"""`make up`: start what is missing, and wait until it works."""

import json
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import httpx

from deploy.local import api, databases
from deploy.local.processes import Processes, Record, ServiceError, signature, stop, who_has
from deploy.local.register import register
from deploy.local.services import Service, clients, data_folder, services, with_programs
from deploy.local.settings import FILE, PREFIX, Settings, SettingsError, check_machine

LIMIT_SECONDS = 240.0  # for a server or a worker to become healthy, on a busy machine
EVERY_SECONDS = 10.0  # between two lines of progress
POLL_SECONDS = 0.5
SERVERS = Path(".dparallel/servers.toml")  # as prefect.toml names it


def up(settings: Settings, others: Mapping[str, str], root: Path, say: Callable[[str], None]) -> None:
    """Start servers and workers that do not run, with pools, deployments and automations.

    Raises:
        SettingsError: something prevents the start; nothing was started.
        ServiceError: a server or a worker does not become healthy; what this call started is stopped again.
    """
    check_machine(settings, {**os.environ, **others}, root)
    data = data_folder(settings, root)
    processes = Processes(data)
    wanted = services(settings, others, root)
    missing = _missing(wanted, processes)
    if missing and missing[0].port is not None:
        names = ("prefect_database", "mlflow_store")
        databases.check({f"{PREFIX}{name.upper()}": getattr(settings, name) for name in names}, root)
    begun: list[Record] = []
    try:
        started = {}
        for service in missing:
            if service.port is not None:
                started[service.name] = _start(service, processes, root, begun)
                say(f"{service.name}: starting, log in {shown(processes.log(service.name), root)}")
        for service in wanted:
            if service.port is not None:
                is_healthy = partial(api.answers, service.health)
                _wait(service.name, is_healthy, processes, say, service in missing)
        server = api.Server(settings.prefect_url)
        slots = settings.cpu_workers * settings.cpu_runs
        variables = {**others, **clients(settings, root)}
        register(server, variables, root, data, say, slots, settings.notify_url)
        for service in missing:
            if service.pool is not None:
                started[service.name] = _start(service, processes, root, begun)
        for service in wanted:
            if service.pool is not None:
                is_online = _online(server, service, started.get(service.name))
                _wait(service.name, is_online, processes, say, service in missing)
    except BaseException:
        stop(reversed(begun))
        for record in begun:
            processes.forget(record.name)
        raise
    _write_servers(root, clients(settings, root))


def _missing(wanted: list[Service], processes: Processes) -> list[Service]:
    """The services that do not run; the others must be as the settings say.

    Raises:
        SettingsError: one runs with other settings, or a port is in use.
    """
    records = processes.records()
    running = {name: record for name, record in records.items() if record.process is not None}
    differ = [s.name for s in wanted if s.name in running and running[s.name].signature != _signature(s)]
    surplus = sorted(set(running) - {service.name for service in wanted})
    if differ or surplus:
        raise SettingsError(
            f"{', '.join([*differ, *surplus])}: running with earlier settings than those of {FILE} now; "
            "run make down, then make up"
        )
    missing = [service for service in wanted if service.name not in running]
    for service in missing:
        if service.name in records:  # its leader was killed: nothing of it may disturb its successor
            stop([records[service.name]])
        if service.port is not None and (reason := who_has(_host(service), service.port)):
            raise SettingsError(
                f"port {service.port} for {service.name} {reason}: "
                f"end that, or set {service.setting} in {FILE}"
            )
    return missing


def _host(service: Service) -> str:
    return service.command[service.command.index("--host") + 1]


def _signature(service: Service) -> str:
    return signature(service.command, service.own)


def _start(service: Service, processes: Processes, root: Path, begun: list[Record]) -> Record:
    record = processes.start(
        service.name, service.command, with_programs(service.own), root, _signature(service)
    )
    begun.append(record)
    return record


def _wait(
    name: str, works: Callable[[], bool], processes: Processes, say: Callable[[str], None], is_new: bool
) -> None:
    """Wait until a service works, with a line of progress now and then."""
    begin = told = time.monotonic()
    while not works():
        now = time.monotonic()
        record = processes.records().get(name)
        ended = record is None or record.process is None
        if ended or now - begin > LIMIT_SECONDS:
            why = "ended" if ended else f"is not healthy after {LIMIT_SECONDS:.0f} s"
            log = processes.log(name)
            raise ServiceError(f"{name} {why}; the end of {log}:\n{processes.last_lines(name)}")
        if now - told > EVERY_SECONDS:
            told = now
            say(f"{name}: waiting ({now - begin:.0f} s)")
        time.sleep(POLL_SECONDS)
    say(f"{name}: {'started' if is_new else 'runs already'}")


def _online(server: api.Server, service: Service, started: Record | None) -> Callable[[], bool]:
    """Whether a worker has reported to the server, since its start if it is new."""
    since = started.created if started is not None else 0.0

    def is_online() -> bool:
        assert service.pool is not None
        try:
            return server.workers_online(service.pool).get(service.address, -1.0) >= since
        except httpx.HTTPError:
            return False

    return is_online


def _write_servers(root: Path, variables: Mapping[str, str]) -> None:
    """Let Prefect's commands and flows that are started in `root` find the servers, until `make down`."""
    others = {name: value for name, value in variables.items() if name != "PREFECT_API_URL"}
    lines = [
        "# Written by `make up`, removed by `make down`: the servers of commands given in this project.",
        'active = "up"',
        "[profiles.up]",
        f"PREFECT_API_URL = {json.dumps(variables['PREFECT_API_URL'])}",
        "[environment]",
        *(f"{name} = {json.dumps(value)}" for name, value in others.items()),
    ]
    text = "\n".join(lines) + "\n"
    path = root / SERVERS
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        partial = path.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)


def remove_servers(root: Path) -> None:
    (root / SERVERS).unlink(missing_ok=True)


def shown(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
