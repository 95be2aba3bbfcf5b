import json
import socket
from pathlib import Path

import pytest
from mlflow import MlflowClient

from dparallel.config.experiment import MergingConfig
from dparallel.stages.manifest import Stage
from tests.stores import new_store

METRICS = [{"train_step": step, "loss": 1.0 / step, "entropy": 0.5} for step in range(1, 6)]


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """A temporary MLflow store in sqlite, and its client."""
    uri = new_store(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return MlflowClient(tracking_uri=uri)


def finish_stage(folder: Path, name: str) -> None:
    """A finished stage's folder with a weights file, a plot, a shard and metrics over steps."""
    teacher = folder.parent / "teacher"
    teacher.mkdir(parents=True, exist_ok=True)
    (teacher / "config.json").write_text("{}", encoding="utf-8")
    stage = Stage(name, MergingConfig(check_prompts=3), {"teacher": teacher}, folder)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "weights.bin").write_bytes(b"weights")
    (folder / "curve.png").write_bytes(b"picture")
    (folder / "part-00000.parquet").write_bytes(b"rows")
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in METRICS), encoding="utf-8"
    )
    files = ["adapter/weights.bin", "curve.png", "part-00000.parquet", "metrics.jsonl"]
    stage.finish(files, counts={"rows": 24}, metrics={"max_difference": 1e-6})
