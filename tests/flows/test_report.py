"""The report of an experiment that was killed and given again, beside that of an undisturbed one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.dparallel.reporting.times import without_times

SMALL = ["benchmark.test.count=8", "benchmark.validation.count=8", "trajectories.problems.count=8"]


def started(config_file: Path, runs: Path) -> subprocess.Popen:
    """`flows.distill` in a process group of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    environment |= {
        "PREFECT_HOME": str(runs.parent / "prefect"),
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
    }
    command = [sys.executable, "-m", "flows.distill", "--config", str(config_file), "--set", *SMALL]
    with (runs.parent / f"{runs.name}.log").open("a", encoding="utf-8") as log:
        return subprocess.Popen(
            [*command, f"runs={runs}"], env=environment, stdout=log, stderr=log, start_new_session=True
        )


def report_of(config_file: Path, runs: Path) -> dict[str, str]:
    """Run to the end; texts of the report's files by suffix."""
    log = runs.parent / f"{runs.name}.log"
    assert started(config_file, runs).wait(timeout=600) == 0, log.read_text(encoding="utf-8")
    files = runs.glob("small/report-*/report.*")
    return {path.suffix: path.read_text(encoding="utf-8") for path in files}


@pytest.mark.slow
@pytest.mark.usefixtures("local_store")
def test_a_killed_and_resumed_experiment_reports_as_an_undisturbed_one(
    config_file: Path, tmp_path: Path
) -> None:
    undisturbed = report_of(config_file, tmp_path / "undisturbed")
    runs = tmp_path / "killed"
    process = started(config_file, runs)
    deadline = time.monotonic() + 600
    while len(list(runs.glob("measurements/samples/*/*.parquet"))) < 3:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert not list(runs.glob("small/report-*"))
    resumed = report_of(config_file, runs)
    assert set(resumed) == {".json", ".md", ".html"}
    assert without_times(resumed) == without_times(undisturbed)
