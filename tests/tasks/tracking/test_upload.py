import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow import MlflowClient

from dparallel.stages.manifest import StageError
from tasks.tracking import links
from tasks.tracking.records import tracking_uri
from tasks.tracking.run import track
from tasks.tracking.upload import upload, upload_record
from tests.tasks.conftest import finish_stage
from tests.tasks.tracking.helpers import (
    assert_everything_arrived,
    away,
    change,
    mlflow_server,
    pending,
    runs_of,
    track_everything,
    upload_command,
)


def test_uploading_twice_makes_no_duplicates(store: MlflowClient, tmp_path: Path) -> None:
    track_everything(tmp_path / "runs" / "coins")
    for path in (tmp_path / "runs").glob("**/tracking/*.json"):
        upload_record(path)
    assert_everything_arrived(store, "coins")
    assert len(store.search_model_versions("name = 'coins'")) == 1


@pytest.mark.slow
def test_a_server_that_is_away_gets_everything_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"http://127.0.0.1:{free_port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    runs = tmp_path / "runs"
    began = time.monotonic()
    track_everything(runs / "coins")
    assert time.monotonic() - began < 60, "a dead server must not hold up a stage"
    assert f"python -m tasks.tracking upload {runs / 'coins'}" in caplog.text
    assert len(pending(runs)) == 5

    assert len(upload(runs)) == 5, "still away, so still pending"
    assert len(pending(runs)) == 5

    with mlflow_server(free_port, tmp_path):
        monkeypatch.delenv("MLFLOW_TRACKING_URI")  # the records name their store
        done = upload_command(str(runs))
        assert done.returncode == 0, done.stderr
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert pending(runs) == []
        client = MlflowClient(tracking_uri=uri)
        assert_everything_arrived(client, "coins")
        assert upload(runs) == []
        assert_everything_arrived(client, "coins")

        with track(runs / "linked", "distill", "wise-otter", {}) as run:
            (shown,) = runs_of(client, "linked")
            assert (
                run.link
                == f"{uri}/#/experiments/{shown.info.experiment_id}/runs/{shown.info.run_id}?{links.TRAINING}"
            )
    run.update(files=[])
    assert run.link is None, "the server went away"


@pytest.mark.slow
def test_a_run_whose_process_was_killed_is_closed_by_the_upload(store: MlflowClient, tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys\n"
        "from tasks.tracking.run import Run, track\n"
        "run = track(pathlib.Path(sys.argv[1]), 'distill', 'killed', {})\n"
        "run.__enter__()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "coins")])
    with track(tmp_path / "coins", "distill", "going on", {}):
        assert [each.info.status for each in runs_of(store, "coins")] == ["RUNNING", "RUNNING"]
        assert upload(tmp_path) == []
        assert [each.info.status for each in runs_of(store, "coins")] == ["KILLED", "RUNNING"]


def test_a_folder_that_is_gone_stays_pending_and_holds_nothing_else_up(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "runs" / "coins"
    with track(home, "merging", "merging a", {}, folder=str(home / "gone")):
        pass
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    with track(home, "distill", "b", {}):
        pass
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    (failure,) = upload(tmp_path)
    assert StageError.__name__ in failure
    assert [record.name for record in pending(tmp_path)] == ["merging a"]


def test_a_record_that_cannot_be_read_holds_nothing_else_up(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = away(tmp_path / "coins", monkeypatch)
    damaged = damaged.rename(damaged.with_name("0.json"))  # the first in order
    damaged.write_text("{", encoding="utf-8")
    away(tmp_path / "coins", monkeypatch)
    (failure,) = upload(tmp_path)
    assert failure.startswith(f"{damaged}: ")
    assert [each.info.status for each in runs_of(store, "coins")] == ["FINISHED"]


def test_a_process_that_took_over_the_number_of_a_killed_one_is_not_it(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = away(tmp_path / "coins", monkeypatch)
    change(path, status="RUNNING", identity=1)
    assert upload(tmp_path) == []
    assert [each.info.status for each in runs_of(store, "coins")] == ["KILLED"]


@pytest.mark.slow
def test_runs_of_other_hosts_are_closed_only_by_force(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = away(tmp_path / "coins", monkeypatch)
    change(path, status="RUNNING", host="elsewhere")
    skipped = upload_command(str(tmp_path))
    assert skipped.returncode == 0
    assert "running: on host elsewhere" in skipped.stderr
    assert "--all" in skipped.stderr
    assert upload(tmp_path, other_hosts=True) == []
    assert [each.info.status for each in runs_of(store, "coins")] == ["KILLED"]


@pytest.mark.slow
def test_upload_says_when_there_is_nothing_to_do(store: MlflowClient, tmp_path: Path) -> None:
    nowhere = upload_command("nowhere")
    assert (nowhere.returncode, nowhere.stderr.count("\n")) == (2, 1)
    assert nowhere.stderr.startswith("error: nowhere: no such folder")
    nothing = upload_command(str(tmp_path))
    assert nothing.returncode == 0
    assert "nothing pending" in nothing.stderr


def test_a_deleted_experiment_comes_with_the_remedy(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with track(tmp_path / "coins", "distill", "before", {}):
        pass
    experiment = store.get_experiment_by_name("coins")
    assert experiment is not None
    store.delete_experiment(experiment.experiment_id)
    away(tmp_path / "coins", monkeypatch)
    (failure,) = upload(tmp_path)
    assert failure.endswith(f"mlflow experiments restore -x {experiment.experiment_id}")
    remedy = failure.split("mlflow ")[1].split()
    environment = {**os.environ, "MLFLOW_TRACKING_URI": tracking_uri()}
    subprocess.run([sys.executable, "-m", "mlflow", *remedy], env=environment, check=True)
    assert upload(tmp_path) == []


def test_a_model_is_one_version_however_many_runs_made_it(store: MlflowClient, tmp_path: Path) -> None:
    home = tmp_path / "runs" / "coins"
    merged = home / "merging-random-0"
    finish_stage(merged, "merging")
    for _ in range(2):
        with track(home, "merging", "merging random", {}, None, str(merged), student="random"):
            pass
    assert len(store.search_model_versions("name = 'coins'")) == 1


def test_the_twin_that_made_a_model_registers_it(store: MlflowClient, tmp_path: Path) -> None:
    """The run that waited for it is uploaded first."""
    home = tmp_path / "runs" / "coins"
    merged = home / "merging-random-0"
    with track(home, "merging", "makes", {}, None, str(merged), student="random"):
        with track(home, "merging", "waits", {}, None, str(merged), student="random") as waits:
            finish_stage(merged, "merging")
            waits.record = waits.record.model_copy(update={"reused": True})
        assert store.search_model_versions("name = 'coins'") == []
    (version,) = store.search_model_versions("name = 'coins'")
    assert store.get_run(version.run_id).info.run_name == "makes"


def test_runs_that_create_their_experiment_at_once_are_of_one(store: MlflowClient, tmp_path: Path) -> None:
    start = threading.Barrier(4)

    def run(number: int) -> None:
        start.wait()
        with track(tmp_path / "runs" / "coins", "distill", f"twin {number}", {}):
            pass

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    assert len(runs_of(store, "coins")) == 4
    assert pending(tmp_path) == []
