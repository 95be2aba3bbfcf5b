"""Processes are started once, found again, and ended with all that they started; others are left alone."""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from deploy.local import up
from deploy.local.processes import Processes, Record, stop, who_has
from deploy.local.services import Service, services, with_programs
from deploy.local.settings import Settings, SettingsError

# Starts a child that ignores SIGTERM, as a training does, and waits for it.
PARENT = """
import signal, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); "
child += "time.sleep(60)"
subprocess.Popen([sys.executable, "-c", child]).wait()
"""


def service(name: str = "cpu-1", code: str = PARENT) -> Service:
    return Service(name, (sys.executable, "-c", code), {}, "", pool="cpu")


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path / "data")
    yield made
    stop(made.records().values(), seconds=0)


def started(processes: Processes, one: Service) -> Record:
    record = up._start(one, processes, Path.cwd(), [])
    end = time.monotonic() + 20
    while "ready" not in processes.log(one.name).read_text(encoding="utf-8"):
        assert time.monotonic() < end
        time.sleep(0.02)
    return record


def test_a_process_is_ended_with_its_children(processes: Processes) -> None:
    record = started(processes, service())
    members = record.members()
    assert len(members) == 2
    assert os.getsid(record.pid) == record.pid != os.getsid(0)
    stop([record], seconds=5)
    assert not any(psutil.pid_exists(process.pid) and process.is_running() for process in members)
    assert record.process is None


def test_children_of_a_killed_process_are_found_and_ended(processes: Processes) -> None:
    record = started(processes, service())
    psutil.Process(record.pid).kill()
    psutil.Process(record.pid).wait()
    assert record.process is None
    [orphan] = record.members()
    stop([record], seconds=0)
    assert not orphan.is_running()


def test_a_process_with_the_number_of_an_earlier_one_is_left_alone(processes: Processes) -> None:
    record = started(processes, service())
    another = replace(record, identity=record.identity + 1)
    assert another.process is None
    assert another.members() == []
    stop([another], seconds=0)
    assert record.process is not None


def test_what_runs_with_the_same_settings_is_not_started_again(processes: Processes) -> None:
    one = service()
    started(processes, one)
    assert up._missing([one], processes) == []
    assert up._missing([one, service("cpu-2")], processes) == [service("cpu-2")]
    with pytest.raises(
        SettingsError, match=r"^cpu-1: running with earlier settings .* make down, then make up"
    ):
        up._missing([replace(one, own={"OMP_NUM_THREADS": "2"})], processes)
    with pytest.raises(SettingsError, match=r"^cpu-1: running with earlier settings"):
        up._missing([], processes)  # fewer workers


def test_records_hold_no_secret(processes: Processes) -> None:
    one = replace(service(), own={"MLFLOW_BACKEND_STORE_URI": "postgresql://ann:secret@db/mlflow"})
    started(processes, one)
    for path in (processes.pids.parent).rglob("*"):
        assert not path.is_file() or "secret" not in path.read_text(encoding="utf-8")


def test_a_database_with_its_password_is_no_argument_of_a_command() -> None:
    settings = Settings(
        prefect_database="postgresql+asyncpg://ann:secret@db/prefect", mlflow_store="sqlite:///secret.db"
    )
    for one in services(settings, {}, Path("/project")):
        assert "secret" not in " ".join(one.command)


@pytest.mark.parametrize("name", ["prefect", "mlflow"])
def test_a_port_in_use_is_named_with_its_process_and_the_setting(processes: Processes, name: str) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        settings = Settings(**{f"{name}_port": port})  # type: ignore[arg-type]
        [one] = [each for each in services(settings, {}, Path.cwd()) if each.name == name]
        expected = (
            rf"port {port} for {name} is in use by process {os.getpid()} \(.*DPARALLEL_{name.upper()}_PORT"
        )
        with pytest.raises(SettingsError, match=expected):
            up._missing([one], processes)
    assert who_has("127.0.0.1", port) is None


def test_clients_reach_the_store_of_local_runs_directly() -> None:
    """So that nothing changes for them when the servers are stopped."""
    cpu = next(each for each in services(Settings(), {}, Path.cwd()) if each.name == "cpu-1")
    assert "MLFLOW_TRACKING_URI" not in cpu.own
    elsewhere = Settings(mlflow_store="sqlite:////srv/mlflow.db", mlflow_port=5001)
    cpu = next(each for each in services(elsewhere, {}, Path.cwd()) if each.name == "cpu-1")
    assert cpu.own["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5001"


def test_servers_of_the_shell_do_not_mislead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://elsewhere/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    assert not {"PREFECT_API_URL", "MLFLOW_TRACKING_URI"} & set(with_programs({}))


NO_RECORDS = {
    kind: json.dumps({"name": "a", "pid": pid, "identity": 1, "created": 1.0, "signature": ""})
    for kind, pid in (("text", "x"), ("negative", -1))
}


def test_damaged_records_are_ignored(processes: Processes) -> None:
    processes.pids.mkdir(parents=True)
    (processes.pids / "folder.json").mkdir()
    for name, text in {"empty": "", "list": "[]", "other": json.dumps({"pid": 1}), **NO_RECORDS}.items():
        (processes.pids / f"{name}.json").write_text(text, encoding="utf-8")
    with contextlib.suppress(KeyError):
        assert processes.records() == {}


@pytest.mark.skipif(not psutil.LINUX, reason="where /proc/stat has the time of the boot")
def test_a_clock_that_is_set_hides_no_process(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    record = started(processes, service())
    boot = psutil._pslinux.boot_time()
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: boot - 3600)
    assert record.process is not None
    assert record.members() != []


def test_a_process_that_cannot_be_recorded_is_ended(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device", str(target))

    pid_file = tmp_path / "pid"
    command = ["sh", "-c", f"echo $$ > {pid_file}; exec sleep 60"]
    monkeypatch.setattr("deploy.local.processes.os.replace", full)
    before = {process.pid for process in psutil.Process().children()}
    with pytest.raises(OSError, match="No space"):
        processes.start("cpu-1", command, dict(os.environ), tmp_path, "")
    assert {process.pid for process in psutil.Process().children()} <= before
