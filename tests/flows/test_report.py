"""The report of an experiment: of several benchmarks, and of a killed run beside an undisturbed one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from prefect import flow

from dparallel.config.experiment import MergingConfig, PromotionConfig
from dparallel.stages.experiment import StagePlan
from dparallel.stages.manifest import Stage
from dparallel.stages.metrics_log import METRICS
from tasks.benchmark import report
from tasks.tracking.run import track
from tests.dparallel.reporting.made import finished_benchmark
from tests.dparallel.reporting.times import without_times

SMALL = [
    "benchmarks.coins.test.count=8",
    "benchmarks.coins.validation.count=8",
    "trajectories.problems.count=8",
]


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


def training(folder: Path) -> StagePlan:
    """A finished training with a loss."""
    stage = Stage("training", MergingConfig(), {}, folder)
    (folder / METRICS).write_text('{"train_step": 1, "loss": 0.5}\n', encoding="utf-8")
    stage.finish([])
    return StagePlan(stage="training", student="fast", config={}, inputs={}, out_dir=str(folder))


@pytest.mark.usefixtures("prefect_server")
def test_several_benchmarks_are_reported_together(
    tiny_checkpoint: Path, tmp_path: Path, local_store: str
) -> None:
    home = tmp_path / "runs" / "sums"
    stages = {
        name: finished_benchmark(home.parent, tiny_checkpoint, key=f"{name}-0123456789") for name in "ab"
    }
    plans = [
        StagePlan(
            stage="benchmark",
            benchmark=name,
            config={},
            inputs={"teacher": str(tiny_checkpoint), "student/fast": str(tiny_checkpoint)},
            out_dir=str(stage),
            measurements=str(home.parent / "measurements"),
        )
        for name, stage in stages.items()
    ]

    @flow
    def reported() -> str:
        with track(home, "distill", "sums", {}) as run:
            return report(home, plans, [training(home / "training-fast")], run, PromotionConfig())

    text = reported()
    assert text.startswith("# sums\n")
    assert "\n## a\n" in text
    assert "\n## b\n" in text
    client = MlflowClient(tracking_uri=local_store)
    [experiment] = client.search_experiments(filter_string="name = 'sums'")
    [run] = client.search_runs([experiment.experiment_id])
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
        "config.yaml",
        "loss_curves.png",
        "report.html",
        "report.json",
        "report.md",
        "samples",
        "tradeoff-a.png",
        "tradeoff-b.png",
    }
    assert run.data.metrics["a/student/fast/entropy/accuracy"] == 0.6
    assert run.data.metrics["b/student/fast/entropy/accuracy"] == 0.6


@pytest.mark.slow
@pytest.mark.usefixtures("local_store")
def test_a_killed_and_resumed_experiment_reports_as_an_undisturbed_one(
    config_file: Path, tmp_path: Path
) -> None:
    small = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    del small["students"]["no_certainty"]
    config_file.write_text(yaml.safe_dump(small), encoding="utf-8")
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
