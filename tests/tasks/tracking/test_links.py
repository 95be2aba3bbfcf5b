import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from deploy.local import services
from tasks.tracking import links
from tasks.tracking.records import tracking_uri
from tasks.tracking.run import track
from tests.tasks.tracking.helpers import runs_of, wait_for


def test_a_store_without_a_server_is_opened_by_a_command(store: MlflowClient) -> None:
    command, page = links.how_to_open()
    assert command.endswith(f"-m tasks.tracking ui --store {tracking_uri()}")
    assert page == "http://127.0.0.1:5000/#/experiments?workflowType=machine_learning"


def test_a_server_is_opened_at_its_page_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000/")
    (page,) = links.how_to_open(experiment_id="7")
    assert page.startswith("http://localhost:5000/#/experiments/7/runs?workflowType=machine_learning&")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert tracking_uri() == f"sqlite:///{Path.cwd()}/mlflow.db"
    monkeypatch.setenv("DPARALLEL_MLFLOW_UI", "http://127.0.0.1:5001")
    assert links.how_to_open() == ["http://127.0.0.1:5001/#/experiments?workflowType=machine_learning"]


def test_a_local_run_links_to_the_ui_to_be_opened(store: MlflowClient, tmp_path: Path) -> None:
    with track(tmp_path / "coins", "distill", "wise-otter", {}) as run:
        (shown,) = runs_of(store, "coins")
        page = f"/#/experiments/{shown.info.experiment_id}/runs/{shown.info.run_id}"
        assert run.link == f"http://127.0.0.1:5000{page}?workflowType=machine_learning"


def test_make_up_prints_the_same_page() -> None:
    """deploy/ imports nothing of tasks/, whose imports take seconds."""
    assert links.runs_page("") == services.RUNS


def test_the_experiment_opens_with_the_columns_that_matter(store: MlflowClient, tmp_path: Path) -> None:
    other = store.create_experiment("coins", tags={"mlflow.note.content": "my own words"})
    with track(tmp_path / "coins", "distill", "wise-otter", {}):
        pass
    tags = store.get_experiment(other).tags
    assert tags["mlflow.note.content"] == "my own words"
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    state = json.loads(tags[f"mlflow.sharedViewState.{links.VIEW}"])
    assert "metrics.`headline/accuracy`" in state["selectedColumns"]


def ui(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tasks.tracking", "ui", *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)


@pytest.mark.slow
def test_a_mistake_of_the_ui_is_one_line(free_port: int) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port))
        taken.listen()
        refused = ui("--port", str(free_port))
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: port {free_port} cannot be used")
    assert refused.stderr.count("\n") == 1
    unknown = ui("--store", "foo://ann:secret@host")
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("error: foo://ann@host: no store of MLflow; valid: a folder, sqlite://…")
    served = ui("--store", "http://127.0.0.1:1")
    assert served.returncode == 0
    assert "http://127.0.0.1:1/#/experiments?workflowType=machine_learning" in served.stdout


@pytest.mark.slow
def test_the_ui_is_two_processes_and_prints_the_page_that_it_opens(
    store: MlflowClient, tmp_path: Path, free_port: int
) -> None:
    """`mlflow server` keeps one process beside that of its only worker."""
    command = [sys.executable, "-m", "tasks.tracking", "ui", "--port", str(free_port)]
    with (tmp_path / "ui.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{free_port}/health", process)
        assert len(psutil.Process(process.pid).children(recursive=True)) <= 2
        said = (tmp_path / "ui.log").read_text(encoding="utf-8")
        assert said.startswith(f"http://127.0.0.1:{free_port}/#/experiments?workflowType=machine_learning\n")
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
