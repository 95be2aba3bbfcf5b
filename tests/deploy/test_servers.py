"""`make up`, `make status` and `make down` with real servers and workers, in a folder like a clone."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import httpx
import psutil
import pytest

from deploy.local.processes import Processes, stop

ROOT = Path(__file__).parents[2]
CLONE = ("configs", "dparallel", "flows", "tasks", "teachers", "deploy", "prefect.yaml", "prefect.toml")
SMALL = 'overrides=["trajectories.problems.count=24","trajectories.shard_size=24","name=small"]'

pytestmark = pytest.mark.slow


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Clone:
    """A folder like a clone, with servers on ports of its own."""

    def __init__(self, folder: Path, **settings: str):
        for name in CLONE:
            ignored = shutil.ignore_patterns("__pycache__")
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, folder / name, **({"ignore": ignored} if copy is shutil.copytree else {}))
        self.folder = folder
        self.prefect, self.mlflow = free_ports(2)
        lines = {"DPARALLEL_PREFECT_PORT": self.prefect, "DPARALLEL_MLFLOW_PORT": self.mlflow, **settings}
        text = "".join(f"{name}={value}\n" for name, value in lines.items())
        (folder / ".env").write_text(text, encoding="utf-8")

    def run(self, *command: str, code: int | None = 0) -> str:
        # As on a shell: nothing says where the servers are.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        environment["PYTHONPATH"] = str(self.folder)
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            timeout=600,
        )
        assert code is None or done.returncode == code, done.stdout
        return done.stdout

    def make(self, target: str, code: int = 0) -> str:
        return self.run("deploy.local", target, code=code)

    def pids(self) -> dict[str, int]:
        return {name: record.pid for name, record in Processes(self.folder / ".dparallel").records().items()}

    def processes(self) -> list[psutil.Process]:
        """Every process that works in this folder, apart from this one."""
        found = []
        for process in psutil.process_iter():
            try:
                if Path(process.cwd()) == self.folder and process.status() != psutil.STATUS_ZOMBIE:
                    found += [process] if process.pid != os.getpid() else []
            except (psutil.Error, OSError):
                continue
        return found


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Clone]:
    made = Clone(tmp_path)
    yield made
    stop(Processes(tmp_path / ".dparallel").records().values(), seconds=0)


@pytest.fixture
def told() -> Iterator[tuple[str, list[str]]]:
    """An address for notifications, and the texts that it got."""
    texts: list[str] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            texts.append(json.loads(body)["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/hook", texts
        server.shutdown()
        thread.join()


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_day_with_servers(clone: Clone, told: tuple[str, list[str]]) -> None:
    address, texts = told
    with (clone.folder / ".env").open("a", encoding="utf-8") as file:
        file.write(f"DPARALLEL_NOTIFY_URL={address}\n")
    status = clone.make("status", code=1)
    assert "not running: prefect, mlflow, cpu-1, gpu-1; start what is missing by make up" in status

    printed = clone.make("up")
    assert f"Prefect  http://127.0.0.1:{clone.prefect}\n" in printed
    assert f"http://127.0.0.1:{clone.mlflow}/#/experiments?workflowType=machine_learning\n" in printed
    assert "prefect deployment run distill/full --watch" in printed
    pids = clone.pids()
    assert set(pids) == {"prefect", "mlflow", "cpu-1", "gpu-1"}
    assert len(psutil.Process(pids["mlflow"]).children(recursive=True)) == 1, "two processes, not fifteen"

    began = time.monotonic()
    again = clone.make("up")
    assert time.monotonic() - began < 30
    assert clone.pids() == pids
    for name in pids:
        assert f"{name}: runs already\n" in again
    assert "deployments: 8 are there" in again
    api = f"http://127.0.0.1:{clone.prefect}/api"
    automations = httpx.post(f"{api}/automations/filter", json={}, trust_env=False).json()
    assert len(automations) == len(list((ROOT / "deploy" / "automations").glob("*.yaml")))
    queue = httpx.get(f"{api}/work_pools/cpu/queues/experiments", trust_env=False).json()
    assert queue["concurrency_limit"] == 1, "of two slots, one is for the stages of an experiment"

    psutil.Process(pids["gpu-1"]).kill()
    assert "not running: gpu-1;" in clone.make("status", code=1)
    clone.make("up")
    after = clone.pids()
    assert after.pop("gpu-1") != pids.pop("gpu-1")
    assert after == pids

    # Neither command is told where the servers are.
    ran = clone.run("prefect", "deployment", "run", "trajectories/record", "--param", SMALL, "--watch")
    assert "Flow run finished successfully" in ran
    assert len(list((clone.folder / "runs" / "small").glob("trajectories-*"))) == 1, "made in this folder"
    local = ("flows.trajectories", "--config", "configs/tiny.yaml", "--set", "trajectories.problems.count=24")
    assert "runs/small/trajectories-" in clone.run(*local, "trajectories.shard_size=24", "name=small")
    runs = httpx.post(f"{api}/flow_runs/filter", json={}, trust_env=False).json()
    assert sorted(run["name"] for run in runs if "shards" in run["name"]) == ["small: shards, part 1 of 1"]
    assert {run["state_type"] for run in runs} == {"COMPLETED"}
    assert len(runs) == 3
    assert (clone.folder / "mlflow.db").is_file()
    assert not (clone.folder / "mlartifacts").exists()

    absent = ("--param", 'config="configs/absent.yaml"', "--watch")
    clone.run("prefect", "deployment", "run", "trajectories/record", *absent, code=1)
    end = time.monotonic() + 60
    while not texts and time.monotonic() < end:
        time.sleep(0.5)
    assert len(texts) == 1
    assert texts[0].startswith("absent: trajectories: Failed. ")
    assert "configs/absent.yaml" in texts[0]
    assert f"http://127.0.0.1:{clone.prefect}/runs/flow-run/" in texts[0]

    status = clone.make("status")
    assert "all is up" in status
    assert "flow runs in progress: none" in status
    assert "distill/full" in status

    assert "all is stopped" in clone.make("down")
    assert clone.processes() == []
    assert is_free(clone.prefect)
    assert is_free(clone.mlflow)
    assert not (clone.folder / ".dparallel" / "servers.toml").exists()
    assert "nothing is running" in clone.make("down")


def test_what_runs_is_stopped_and_named_and_a_failed_start_leaves_nothing(clone: Clone) -> None:
    clone.make("up")
    long = 'overrides=["trajectories.problems.count=20000","name=long"]'
    clone.run("prefect", "deployment", "run", "trajectories/record", "--param", long)
    api = f"http://127.0.0.1:{clone.prefect}/api"
    end = time.monotonic() + 240
    while True:
        runs = httpx.post(f"{api}/flow_runs/filter", json={}, trust_env=False).json()
        if [run["state_type"] for run in runs].count("RUNNING") == 2:
            break
        assert time.monotonic() < end, runs
        assert not {run["state_type"] for run in runs} & {"FAILED", "CRASHED"}, runs
        time.sleep(1)
    stopped = clone.make("down")
    assert "stopping flow run 'long: shards, part 1 of 1' of shards/record-part" in stopped
    command = "prefect deployment run trajectories/record --watch --param 'overrides="
    assert command in stopped.splitlines()[-1]
    assert clone.processes() == []

    with socket.socket() as busy:
        busy.bind(("127.0.0.1", clone.mlflow))
        busy.listen()
        refused = clone.make("up", code=2)
        assert f"port {clone.mlflow} for mlflow is in use by process {os.getpid()}" in refused
    assert clone.processes() == []

    with (clone.folder / ".env").open("a", encoding="utf-8") as file:
        file.write("MLFLOW_STATIC_PREFIX=impossible\n")  # for which the server ends at once
    failed = clone.make("up", code=1)
    assert "error: mlflow ended; the end of " in failed
    assert clone.processes() == []
    assert is_free(clone.prefect)


@pytest.fixture
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a PostgreSQL server, of an ordinary user, with databases `prefect` and `mlflow`."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs or find_spec("psycopg2") is None:
        pytest.skip("needs PostgreSQL (apt-get install postgresql) and dparallel[postgres]")
    [port] = free_ports(1)
    # Other users may not enter pytest's folders.
    folder = Path("/tmp") / f"dparallel-postgres-{os.getpid()}"
    folder.mkdir(mode=0o700)
    user: dict[str, str] = {}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        user = {"user": "postgres", "group": "postgres"}
        shutil.chown(folder, **user)

    def run(program: str, *arguments: str) -> None:
        command = [str(programs[-1] / program), *arguments]
        done = subprocess.run(
            command,
            cwd="/",
            capture_output=True,
            text=True,
            encoding="utf-8",
            **user,  # type: ignore[call-overload]
        )
        assert done.returncode == 0, done.stderr

    data = str(folder / "data")
    run("initdb", "--pgdata", data, "--username", "dparallel", "--auth", "trust", "--no-sync")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    run("pg_ctl", "--pgdata", data, "--wait", "--options", options, "--log", str(folder / "log"), "start")
    try:
        for name in ("prefect", "mlflow"):
            run("createdb", "--host", "127.0.0.1", "--port", str(port), "--username", "dparallel", name)
        yield f"dparallel@127.0.0.1:{port}"
    finally:
        run("pg_ctl", "--pgdata", data, "--mode", "immediate", "stop")
        shutil.rmtree(folder)


def test_both_servers_on_postgresql(tmp_path: Path, postgres: str) -> None:
    clone = Clone(
        tmp_path,
        DPARALLEL_PREFECT_DATABASE=f"postgresql+asyncpg://{postgres}/prefect",
        DPARALLEL_MLFLOW_STORE=f"postgresql://{postgres}/mlflow",
    )
    try:
        clone.make("up")
        ran = clone.run("prefect", "deployment", "run", "trajectories/record", "--param", SMALL, "--watch")
        assert "Flow run finished successfully" in ran
        # A local run finds MLflow's server, too: its run is beside the worker's, in the same experiment. With
        # equal settings it would find the worker's result, whose run stands for both.
        local = ("flows.trajectories", "--config", "configs/tiny.yaml", "--set", "name=small")
        clone.run(*local, "trajectories.problems.count=12", "trajectories.shard_size=12")
        url = f"http://127.0.0.1:{clone.mlflow}/api/2.0/mlflow"
        experiment = httpx.get(
            f"{url}/experiments/get-by-name", params={"experiment_name": "small"}, trust_env=False
        ).json()["experiment"]
        body = {"experiment_ids": [experiment["experiment_id"]]}
        found = httpx.post(f"{url}/runs/search", json=body, trust_env=False).json()["runs"]
        assert [run["info"]["status"] for run in found] == ["FINISHED", "FINISHED"]
        assert not list(tmp_path.glob("mlflow.db*"))
        assert not (tmp_path / ".dparallel" / "prefect" / "prefect.db").exists()
    finally:
        clone.make("down")
    assert clone.processes() == []


def test_ctrl_c_of_a_start_stops_what_it_started(clone: Clone) -> None:
    environment = {**os.environ, "PYTHONPATH": str(clone.folder)}
    command = [sys.executable, "-m", "deploy.local", "up"]
    with subprocess.Popen(command, cwd=clone.folder, env=environment, start_new_session=True) as process:
        end = time.monotonic() + 60
        while "mlflow" not in clone.pids():
            assert time.monotonic() < end
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert clone.processes() == []
    assert clone.pids() == {}
