"""Two workers on a pool that share an S3 server and nothing else; one is killed while it trains."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID

import fsspec
import httpx
import psutil
import pytest
import yaml
from prefect import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import State, StateType
from prefect.settings import PREFECT_API_URL

from dparallel.reporting.read import read_benchmark
from dparallel.stages.manifest import read_manifest
from dparallel.stages.storage.remote import Remote, StorageError
from flows.dispatch import DEPLOYMENTS
from flows.distill import distill
from tests.flows.conftest import small_settings
from tests.test_architecture import ROOT, deployments

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("moto") is None, reason="moto[server] is not installed"),
    pytest.mark.skipif(
        find_spec("s3fs") is None, reason="s3fs is not installed: pip install 'dparallel[s3]'"
    ),
]

POOL = "s3"
STORE = "s3://bucket/runs"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(done: Callable[[], Any], what: str, seconds: float = 240) -> Any:
    """The first true answer of `done`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := done():
            return found
        time.sleep(0.2)
    raise AssertionError(f"after {seconds} s: {what}")


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server on loopback with a bucket; its address. Credentials are in the environment."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with (tmp_path / "moto.log").open("wb") as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def answers() -> bool:
        try:
            return httpx.put(f"{address}/bucket").status_code == 200
        except httpx.HTTPError:
            return False

    try:
        until(answers, "no S3 server")
        for name, value in {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        forget_addresses()
        yield address
    finally:
        forget_addresses()
        server.terminate()
        server.wait()


def forget_addresses() -> None:
    """fsspec keeps clients of a server; processes other than tests meet only one."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()


class Machine:
    """A worker with a working folder and a home of its own."""

    started: ClassVar[list["Machine"]] = []

    def __init__(self, folder: Path, name: str):
        self.started.append(self)
        self.folder, self.logs = folder / name / "project", folder / f"{name}.log"
        self.runs = self.folder / "runs"
        self.folder.mkdir(parents=True)
        (self.folder / "flows").symlink_to(ROOT / "flows")
        home = folder / name / "home"
        home.mkdir()
        shared = ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", "MLFLOW_TRACKING_URI", "LC_ALL")
        environment = {
            key: value for key, value in os.environ.items() if key in shared or key.startswith("AWS_")
        }
        environment |= {
            "HOME": str(home),
            "PREFECT_API_URL": str(PREFECT_API_URL.value()),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DPARALLEL_FOLDER": str(self.folder),
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-m", "flows.worker", "--pool", POOL, "--type", "process"]
        with self.logs.open("wb") as log:
            self.worker = psutil.Popen(
                [*command, "--limit", "1", "--name", name],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def log(self) -> str:
        """What the worker and its runs have printed."""
        return self.logs.read_text(encoding="utf-8")

    def processes(self) -> list[psutil.Process]:
        """The worker and all that it started."""
        try:
            return [self.worker, *self.worker.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def is_training(self) -> bool:
        for process in self.processes():
            try:
                if "dparallel.distillation" in process.cmdline():
                    return True
            except psutil.Error:
                continue
        return False

    def kill(self) -> None:
        """As if its power failed."""
        for process in self.processes():
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        self.worker.wait()


@pytest.fixture
def pool(prefect_server: None) -> Iterator[str]:
    """A work pool and its deployments, whose runs work in the folder that their worker names."""
    made: list[UUID] = []
    folder = "{{ $DPARALLEL_FOLDER }}"
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        for name, (flow, settings) in deployments().items():
            if name in DEPLOYMENTS.values():
                made.append(
                    client.create_deployment(
                        flow_id=client.create_flow_from_name(flow.name),
                        name=settings["name"],
                        work_pool_name=POOL,
                        entrypoint=settings["entrypoint"],
                        parameters=settings["parameters"],
                        pull_steps=[
                            {"prefect.deployments.steps.set_working_directory": {"directory": folder}}
                        ],
                    )
                )
        yield POOL
        for deployment in made:
            client.delete_deployment(deployment)


@pytest.fixture
def machines(pool: str, s3: str, local_store: str, tmp_path: Path) -> Iterator[list[Machine]]:
    yield [Machine(tmp_path, name) for name in ("a", "b")]
    for machine in Machine.started:
        machine.kill()
    Machine.started.clear()


def settings_of(teacher: Path) -> dict[str, Any]:
    settings = small_settings(teacher, Path("runs"))
    del settings["runs"], settings["students"]["no_certainty"]
    settings["trajectories"]["shard_size"] = 6
    del settings["benchmarks"]["coins"]["validation"]
    settings["benchmarks"]["coins"]["sweeps"]["entropy"]["thresholds"] = [5.0]
    settings["training"] |= {"train_steps": 60, "views_per_step": 24, "checkpoint_every": 2}
    return settings


def lose_the_one_that_trains(machines: list[Machine], folder: Path) -> tuple[Machine, Machine]:
    """Kill a machine when a checkpoint of its training is in the store; returns it, and a new one."""
    store = Remote(STORE)
    [machine] = until(lambda: [one for one in machines if one.is_training()], "no training")
    until(lambda: any(name.endswith("/checkpoint.json") for name in store.sizes("small")), "no checkpoint")
    machine.kill()
    with get_client(sync_client=True) as client:  # as the automation for lost runs does, after minutes
        for run in client.read_flow_runs():
            if run.deployment_id and run.state and run.state.is_running():
                lost = State(type=StateType.CRASHED, message="its worker gives no sign")
                client.set_flow_run_state(run.id, lost, force=True)
    return machine, Machine(folder, "c")


def fingerprints(runs: Path) -> dict[str, str]:
    """Of all stages that do not measure time."""
    manifests = {path.parent.name: read_manifest(path.parent) for path in runs.glob("*/*/manifest.json")}
    return {name: made.fingerprint for name, made in manifests.items() if made.stage != "benchmark"}


def rows(runs: Path) -> list[tuple]:
    """What a benchmark found out, but for the times."""
    [folder] = (path.parent for path in runs.glob("*/benchmark-*/manifest.json"))
    return [
        (row.model, row.method, row.split, row.measurement.accuracy, row.measurement.nfe, row.measurement.tpf)
        for row in read_benchmark("coins", folder).rows
    ]


@pytest.mark.timeout(1200)
def test_two_workers_that_share_only_a_bucket(
    machines: list[Machine], s3: str, tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("DPARALLEL_CACHE", str(here / "cache"))
    settings = settings_of(tiny_checkpoint)
    Path("small.yaml").write_text(yaml.safe_dump({**settings, "store": STORE}), encoding="utf-8")

    # 1. Three stages on the workers. Of recording and benchmark, one finishes what the other one makes. The
    #    machine that trains is killed, and its training goes on on one that is left
    with ThreadPoolExecutor(1) as thread:
        exchanged = thread.submit(lose_the_one_that_trains, machines, tmp_path)
        text = distill("small.yaml", None, ("trajectories", "training", "benchmark"))
        lost, new = exchanged.result()
    [left] = (machine for machine in machines if machine is not lost)
    assert text.startswith("| model")
    # The new machine may be the first to ask for the training that the other one lost
    logs = left.log() + new.log()
    begun = [line for line in logs.splitlines() if "training 60 steps" in line]
    assert len(begun) == 1
    assert int(begun[0].split(" from step ")[1].split(",")[0]) > 1, "from a checkpoint of the other machine"
    for machine in machines:
        assert list(machine.runs.glob("small/trajectories-*/part-*")), "both have recorded, or finished it"
    for machine in (left, new):
        assert list(machine.runs.glob("measurements/samples/*/*")), "both have measured, or finished it"
        assert (machine.runs / ".inputs").is_dir(), "the teacher is from the store"

    # 2. Results equal those of an undisturbed run on one machine
    alone = yaml.safe_dump({**settings, "runs": str(tmp_path / "alone")})
    Path("alone.yaml").write_text(alone, encoding="utf-8")
    distill("alone.yaml")
    assert fingerprints(here / "runs") == fingerprints(tmp_path / "alone")
    assert rows(here / "runs") == rows(tmp_path / "alone")


def test_stores_that_cannot_be_used(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="s3://missing/a cannot be used .*bucket.*: create the bucket"):
        Remote("s3://missing/a").check()
    Remote(STORE).check()
    assert Remote(STORE).sizes("") == {}
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    forget_addresses()
    with pytest.raises(StorageError, match="s3://bucket/runs cannot be used .*: check the network and the"):
        Remote(STORE).check()
