"""Servers and workers as `make up` starts them, and runs on them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from mlflow import MlflowClient

from deploy.local.processes import Processes, is_alive, stop
from tests.deploy.test_servers import Clone
from tests.failures.experiment import is_in_the_middle, results, settings, temporary_files
from tests.failures.local import SECONDS, wait_until

ON_POOLS = ("trajectories", "training", "benchmark")  # what the worker of the gpu pool works on
SERVICES = 4  # two servers, two workers
TRAINING = "training on a worker"
NOT_NEEDED = "not needed"
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


class Stack:
    """A clone with its servers; every case has a folder of runs of its own."""

    def __init__(self, folder: Path, teacher: Path, **variables: str):
        stores = {"DPARALLEL_MLFLOW_STORE": f"sqlite:///{folder}/store.db"}
        # Teacher and runs lie beside the clone.
        workers = {"DPARALLEL_THREADS": "1", "DPARALLEL_CPU_RUNS": "4", "DPARALLEL_ROOTS": str(folder.parent)}
        self.clone = Clone(folder, **{**stores, **workers, **variables})
        self.teacher = teacher

    def up(self) -> None:
        """Start what is missing."""
        records = Processes(self.clone.folder / ".dparallel").records().values()
        if len(records) < SERVICES or any(record.process is None for record in records):
            self.clone.make("up")

    def down(self) -> None:
        self.clone.make("down")
        assert self.clone.processes() == []

    def end(self, name: str, number: int) -> None:
        """Send a signal to a server or a worker, and wait for its end; SIGINT as a terminal sends it.

        A server is killed with the process that it has started, which would go on to answer.
        """
        record = Processes(self.clone.folder / ".dparallel").records()[name]
        members = record.members() if name in ("prefect", "mlflow") else [psutil.Process(record.pid)]
        if number == signal.SIGINT:
            os.killpg(record.pid, number)
        elif number == signal.SIGKILL:
            for process in members:
                process.kill()
        else:
            os.kill(record.pid, number)
        wait_until(lambda: not any(map(is_alive, members)), lambda: f"{name} goes on:\n{self.log(name)}", 30)

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.clone.prefect}/api"

    @property
    def mlflow(self) -> str:
        return f"http://127.0.0.1:{self.clone.mlflow}"

    def ask(self, path: str, body: Any) -> Any:
        """A request to Prefect's server."""
        for _ in range(10):
            answer = httpx.post(f"{self.api}/{path}", json=body, trust_env=False, timeout=60)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:  # its database is locked
                break
            time.sleep(1)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def config(self, runs: Path, **changes: Any) -> Path:
        """A config file whose runs are in a folder."""
        path = runs.parent / f"{runs.name}.yaml"
        path.write_text(yaml.safe_dump({**settings(self.teacher, runs), **changes}), encoding="utf-8")
        return path

    def submit(self, deployment: str, config: Path, **parameters: Any) -> str:
        """Start a run of a deployment; its id."""
        flow, _, name = deployment.partition("/")
        found = httpx.get(f"{self.api}/deployments/name/{flow}/{name}", trust_env=False).json()
        body = {"parameters": {"config": str(config), **parameters}, "state": {"type": "SCHEDULED"}}
        run: str = self.ask(f"deployments/{found['id']}/create_flow_run", body)["id"]
        return run

    def state(self, run: str) -> dict[str, Any]:
        state: dict[str, Any] = httpx.get(f"{self.api}/flow_runs/{run}", trust_env=False).json()["state"]
        return state

    def is_crashed_soon(self, run: str) -> None:
        """A run is marked as Crashed within a minute."""

        def is_crashed() -> bool:
            time.sleep(0.2)
            return bool(self.state(run)["type"] == "CRASHED")

        wait_until(is_crashed, lambda: f"{self.state(run)}\n{self.log('gpu-1')}\n{self.log('cpu-1')}", 60)

    def ends(self, run: str, seconds: float = 2 * SECONDS) -> tuple[str, str]:
        """Wait for the end of a run; its state and message."""
        last: dict[str, Any] = {}

        def is_over() -> bool:
            nonlocal last
            time.sleep(0.5)
            with contextlib.suppress(httpx.HTTPError):
                last = self.state(run)
            return last.get("type") in FINAL

        wait_until(is_over, lambda: f"{last}\n{self.log('gpu-1')}\n{self.log('cpu-1')}", seconds)
        return last["type"], last.get("message") or ""

    def log(self, name: str, whole: bool = False) -> str:
        """The log of a server or a worker, or its end."""
        text = (self.clone.folder / ".dparallel" / "logs" / f"{name}.log").read_text(
            encoding="utf-8", errors="replace"
        )
        return text if whole else text[-6000:]

    def runs_in(self, folder: Path) -> list[dict[str, Any]]:
        """All flow runs for a folder of runs, the oldest first."""
        found = [run for run in self.ask("flow_runs/filter", {}) if str(folder) in str(run["parameters"])]
        return sorted(found, key=lambda run: str(run["created"]))

    def quiet(self, folder: Path, seconds: float = SECONDS) -> None:
        """Wait until no flow run for a folder of runs is in progress."""

        def is_quiet() -> bool:
            time.sleep(0.5)
            return all(run["state_type"] in FINAL for run in self.runs_in(folder))

        wait_until(is_quiet, lambda: str(self.runs_in(folder)), seconds)

    def processes(self, *words: str) -> list[psutil.Process]:
        """Processes of the workers whose command line has all these words."""
        found = []
        for process in self.clone.processes():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if all(word in line for word in words):
                    found.append(process)
        return found

    def flow_processes(self, run: str) -> list[psutil.Process]:
        """The process in which a worker runs a flow run."""
        found = []
        for process in self.clone.processes():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("PREFECT__FLOW_RUN_ID") == run and "prefect" in " ".join(
                    process.cmdline()
                ):
                    found.append(process)
        return found

    def upload(self, runs: Path) -> str:
        """`python -m tasks.tracking upload`."""
        done = subprocess.run(
            [sys.executable, "-m", "tasks.tracking", "upload", str(runs)],
            cwd=self.clone.folder,
            env={**os.environ, "MLFLOW_TRACKING_URI": self.mlflow},
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        return done.stdout + done.stderr

    def statuses(self, experiment: str) -> dict[str, list[str]]:
        """Statuses in MLflow of the runs of every stage, the oldest first."""
        client = MlflowClient(tracking_uri=self.mlflow)
        found = client.get_experiment_by_name(experiment)
        assert found is not None
        runs = client.search_runs([found.experiment_id], order_by=["start_time ASC"])
        statuses: dict[str, list[str]] = {}
        for run in runs:
            statuses.setdefault(run.data.tags["stage"], []).append(run.info.status)
        return statuses


@contextlib.contextmanager
def running_stack(folder: Path, teacher: Path, **variables: str) -> Iterator[Stack]:
    """Servers, a cpu and a gpu worker, of which nothing is left in the end."""
    made = Stack(folder, teacher, **variables)
    try:
        made.up()
        yield made
        made.down()
    finally:
        stop(Processes(folder / ".dparallel").records().values(), seconds=0)


@dataclass(frozen=True)
class Case:
    """A folder of runs for a case, in which all stages before one are finished."""

    stack: Stack
    runs: Path
    config: Path
    name: str
    stage: str
    undisturbed: dict[str, str]

    def submit(self, deployment: str = "distill/full", **parameters: Any) -> str:
        return self.stack.submit(deployment, self.config, **parameters)

    def wait_for_the_middle(self, stage: str | None = None) -> None:
        """Wait until some of a stage is done; by default, of the one with which the case begins."""
        wanted, asked = stage or self.stage, time.monotonic()

        def is_so() -> bool:
            nonlocal asked
            if time.monotonic() - asked > 2:  # nothing comes if a run has failed
                asked = time.monotonic()
                failed = [run for run in self.stack.runs_in(self.runs) if run["state_type"] == "FAILED"]
                assert not failed, failed[0]["state"]["message"]
            return is_in_the_middle(self.runs, wanted)

        logs = ("cpu-1", "gpu-1")
        wait_until(is_so, lambda: "\n".join(map(self.stack.log, logs)), 2 * SECONDS)

    def running(self, flow: str) -> str:
        """Wait until a run of a flow is in progress; its id."""

        def found() -> list[str]:
            time.sleep(0.1)
            return [run["id"] for run in self.runs_of(flow) if run["state_type"] == "RUNNING"]

        wait_until(lambda: bool(found()), lambda: self.stack.log("gpu-1"))
        return found()[0]

    def engine(self, run: str) -> psutil.Process:
        """The process in which a worker runs a flow run."""
        [process] = self.stack.flow_processes(run)
        return process

    def runs_of(self, flow: str) -> list[dict[str, Any]]:
        """The runs of a flow; their names begin with the experiment's."""
        return [run for run in self.stack.runs_in(self.runs) if f": {flow}" in run["name"]]

    def states_of(self, flow: str) -> list[str]:
        return [run["state_type"] for run in self.runs_of(flow)]

    def is_undisturbed(self, until: str = "benchmark") -> None:
        """The results up to a stage are those of an undisturbed run, and no temporary file is left."""
        found = results(self.runs)
        assert found == {name: self.undisturbed[name] for name in found}
        assert any(name.startswith(f"{until}-") for name in found)
        assert temporary_files(self.runs) == []

    def same_again(self, deployment: str = "distill/full", until: str = "benchmark") -> None:
        self.stack.up()
        run = self.submit(deployment)
        assert self.stack.ends(run)[0] == "COMPLETED"
        self.is_undisturbed(until)
