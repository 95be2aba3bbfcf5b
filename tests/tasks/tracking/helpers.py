"""What tests of the tracking have in common."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow.entities
import pytest
from mlflow import MlflowClient

from tasks.tracking.records import Record
from tasks.tracking.run import Run, track
from tests.tasks.conftest import METRICS, finish_stage


def wait_for(address: str, process: subprocess.Popen) -> None:
    """Wait until a server answers."""
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(address, timeout=1)
            return
        except OSError:
            assert process.poll() is None, "the server has ended"
            assert time.monotonic() < deadline
            time.sleep(0.2)


@contextmanager
def mlflow_server(port: int, folder: Path) -> Iterator[None]:
    store = [
        "--backend-store-uri",
        f"sqlite:///{folder}/server.db",
        "--artifacts-destination",
        f"{folder}/art",
    ]
    command = [sys.executable, "-m", "mlflow", "server", *store, "--port", str(port), "--workers", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    with (folder / "server.log").open("w", encoding="utf-8") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server)
        yield
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


def runs_of(client: MlflowClient, experiment: str) -> list[mlflow.entities.Run]:
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return client.search_runs([found.experiment_id], order_by=["start_time ASC"])


def upload_command(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tasks.tracking", "upload", *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")


def track_everything(home: Path) -> None:
    """A distill run of four stages: two that are made, one of them reused at once, and one that fails."""
    with track(home, "distill", "wise-otter", {"name": "coins"}, params={"seeds": "1, 2"}) as parent:
        made, above = home / "training-random-0", parent.as_parent
        params = {"check_prompts": "3"}
        with track(home, "training", "training random", {}, above, str(made), params=params):
            finish_stage(made, "training")
        with track(home, "training", "training random", {}, above, str(made), reused=True):
            pass
        merged = home / "merging-random-0"
        with track(home, "merging", "merging random", {}, above, str(merged), student="random"):
            finish_stage(merged, "merging")
        with (
            pytest.raises(RuntimeError),
            track(home, "training", "training other", {}, above, str(home / "gone"), params=params),
        ):
            raise RuntimeError("out of memory\nsecond line")


def assert_everything_arrived(client: MlflowClient, experiment: str) -> None:
    parent, made, merged, failed = runs_of(client, experiment)  # the reused stage has no second run
    assert parent.data.params == {"seeds": "1, 2"}
    assert parent.data.tags["reused/training random"] == made.info.run_id
    assert {each.info.status for each in (parent, made, merged)} == {"FINISHED"}
    for child in (made, merged, failed):
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert made.data.params == failed.data.params == {"check_prompts": "3"}

    assert made.data.metrics["count/rows"] == 24
    assert made.data.metrics["max_difference"] == 1e-6
    history = client.get_metric_history(made.info.run_id, "loss")
    assert [(each.step, each.value) for each in history] == [(n["train_step"], n["loss"]) for n in METRICS]
    assert {each.path for each in client.list_artifacts(made.info.run_id)} == {
        "adapter",
        "config.yaml",
        "curve.png",
        "manifest.json",
        "metrics.jsonl",
    }
    (version,) = client.search_model_versions(f"name = '{experiment}'")
    assert version.run_id == merged.info.run_id
    assert version.tags["fingerprint"]
    assert not client.get_registered_model(experiment).aliases, "no benchmark has measured it"
    (model,) = client.search_logged_models([parent.info.experiment_id])
    assert model.source_run_id == merged.info.run_id
    assert (failed.info.status, failed.data.tags["error"]) == (
        "FAILED",
        "RuntimeError: out of memory second line",
    )


def pending(folder: Path) -> list[Record]:
    records = [
        Record.model_validate_json(path.read_text(encoding="utf-8")) for path in folder.glob("**/tracking/*")
    ]
    return [record for record in records if not record.uploaded]


def away(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished record that is not uploaded yet."""
    before = os.environ["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    with track(home, "distill", "waits", {}) as run:
        pass
    monkeypatch.setenv("MLFLOW_TRACKING_URI", before)
    return run.path


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


def tracking_uri_of(run: Run) -> str:
    return run.as_parent.tracking_uri
