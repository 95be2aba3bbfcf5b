"""Signals to local runs: they end within seconds, say how to go on, and leave nothing behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_store")]

SECONDS = 10.0  # a local run ends in this time


class LocalRun:
    """`python -m flows.distill` as in a terminal: in a process group of its own, which gets the signals."""

    def __init__(self, config_file: Path, folder: Path, *overrides: str):
        self.home = folder / "prefect"
        self.output = folder / "stderr"
        command = [sys.executable, "-m", "flows.distill", "--verbose", "--config", str(config_file)]
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--set", f"runs={folder}/runs", *overrides],
                env={**os.environ, "PREFECT_HOME": str(self.home)},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self.output.read_text(encoding="utf-8")

    def wait_for(self, text: str) -> None:
        """Wait until the run says `text`."""
        deadline = time.monotonic() + 240
        while text not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def family(self) -> list[psutil.Process]:
        """All processes of the run that are alive: they have its Prefect home in their environment."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("PREFECT_HOME") == str(self.home):
                    found.append(process)
        return found

    def is_gone(self) -> bool:
        """Whether all processes end within some seconds."""
        psutil.wait_procs(self.family(), timeout=SECONDS)
        return self.family() == []


@contextlib.contextmanager
def local_run(config_file: Path, folder: Path, *overrides: str) -> Iterator[LocalRun]:
    run = LocalRun(config_file, folder, *overrides)
    try:
        yield run
    finally:
        for process in run.family():
            process.kill()
        run.process.wait()


def temporary_files(folder: Path) -> list[Path]:
    return [path for pattern in ("*.partial", ".saving-*", "lease.json") for path in folder.rglob(pattern)]


def statuses(store: str) -> dict[str, str]:
    """Status of the newest run of every name."""
    client = MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name("small")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], order_by=["start_time ASC"])
    return {run.data.tags["stage"]: run.info.status for run in runs}


INTERRUPTED = {
    "trajectories": ("dparallel.trajectories.record: recording", []),
    "training no_certainty": ("of 100000: ", ["training.train_steps=100000"]),
    "merging no_certainty": ("dparallel.stage: merging no_certainty\n", []),
    "benchmark coins": ("dparallel.stage: benchmark coins\n", ["benchmarks.coins.test.count=1000"]),
}


def test_ctrl_c_in_every_stage(config_file: Path, local_store: str, tmp_path: Path) -> None:
    for stage, (text, overrides) in INTERRUPTED.items():
        with local_run(config_file, tmp_path, *overrides) as run:
            run.wait_for(text)
            began = time.monotonic()
            run.signal(signal.SIGINT)
            assert run.process.wait(60) == 130, run.said
            assert time.monotonic() - began < SECONDS, f"{stage}: {run.said}"
            print(f"{stage}: {time.monotonic() - began:.1f} s")
            assert run.is_gone()
        last = run.said.splitlines()[-1]
        assert f"interrupted in {stage}: what is done is kept. To go on, give the same command: " in last
        assert f"python -m flows.distill --verbose --config {config_file} --set " in last
        assert "Traceback" not in run.said
        assert "refused" not in run.said
        found = statuses(local_store)
        assert found["distill"] == found[stage.split()[0]] == "KILLED", run.said
        assert "RUNNING" not in found.values()
        assert temporary_files(tmp_path / "runs") == []


def test_sigterm_ends_a_run_in_the_same_way(config_file: Path, local_store: str, tmp_path: Path) -> None:
    with local_run(config_file, tmp_path, "training.train_steps=100000") as run:
        run.wait_for("of 100000: ")
        run.process.terminate()
        assert run.process.wait(SECONDS) == 143, run.said
        assert run.is_gone()
    assert "interrupted in training no_certainty: what is done is kept." in run.said.splitlines()[-1]
    assert "Traceback" not in run.said
    assert statuses(local_store) == {"distill": "KILLED", "trajectories": "FINISHED", "training": "KILLED"}


def test_a_killed_run_leaves_no_process(config_file: Path, tmp_path: Path) -> None:
    with local_run(config_file, tmp_path, "training.train_steps=100000") as run:
        run.wait_for("of 100000: ")
        assert any("uvicorn" in process.cmdline() for process in run.family())
        run.process.kill()
        run.process.wait()
        assert run.is_gone()


def test_a_second_ctrl_c_ends_a_run_at_once(config_file: Path, tmp_path: Path) -> None:
    with local_run(config_file, tmp_path, "training.train_steps=100000") as run:
        run.wait_for("of 100000: ")
        workers = [process for process in run.family() if "dparallel.distillation" in process.cmdline()]
        for worker in workers:
            worker.suspend()  # so that an orderly end takes long
        run.signal(signal.SIGINT)
        time.sleep(1)
        assert run.process.poll() is None
        began = time.monotonic()
        run.signal(signal.SIGINT)
        assert run.process.wait(SECONDS) == 130
        assert time.monotonic() - began < 1
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.resume()
        assert run.is_gone()
