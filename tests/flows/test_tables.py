"""The experiment of the papers' tables on the embedded teacher: several benchmarks, and several students."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.distill import distill
from tests.test_architecture import ROOT

SMALL = [
    f"teacher={ROOT / 'teachers' / 'tiny'}",
    "trajectories.problems.count=48",
    "training.train_steps=2",
    "training.views_per_step=8",
    "training.micro_batch_size=8",
    "training.only_correct=false",
    "benchmarks.coins.test.count=8",
    "benchmarks.answers.test.count=8",
]
ROWS = [  # model and method, as in the report's table
    ("teacher", "one token per step"),
    ("teacher", "few step"),
    ("teacher", "dual cache"),
    ("teacher", "confidence"),
    ("certainty forcing", "entropy"),
    ("certainty forcing", "multi block"),
    ("certainty forcing", "one token per step"),
    ("consistency", "entropy"),
    ("consistency", "few step"),
    ("d3llm", "entropy"),
    ("d3llm", "multi block"),
    ("d2f", "pipelined"),
]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("prefect_server")
def test_the_report_has_all_rows_of_the_table_on_both_benchmarks(tmp_path: Path, local_store: str) -> None:
    config = str(ROOT / "configs" / "tiny_table.yaml")
    text = distill(config, [*SMALL, f"runs={tmp_path / 'runs'}"])
    for name in ("coins", "answers"):
        part = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        lines = [line.replace("_", " ").replace("student/", "") for line in part.splitlines()]
        rows = [line for line in lines if line.startswith("|")]
        for model, method in ROWS:
            assert any(model in row and method in row for row in rows), f"{name}: {model}, {method}"
    client = MlflowClient(tracking_uri=local_store)
    [experiment] = client.search_experiments(filter_string="name = 'tiny_table'")
    [run] = client.search_runs([experiment.experiment_id], "tags.stage = 'distill'")
    for name in ("coins", "answers"):
        for student in ("certainty_forcing", "consistency", "d3llm"):
            assert f"{name}/student/{student}/entropy/accuracy" in run.data.metrics
        assert f"{name}/student/d2f/pipelined/tpf" in run.data.metrics
