import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import mlflow.entities
import pytest
from mlflow import MlflowClient

from dparallel.config.experiment import MergingConfig
from dparallel.stages.manifest import Stage, StageError
from tasks.tracking.records import Parent, Record, StoreError, how_to_open, read_record, tracking_uri
from tasks.tracking.registry import ALIAS
from tasks.tracking.run import Run, track
from tasks.tracking.upload import upload, upload_record
from tests.stores import new_store
from tests.tasks.conftest import METRICS, finish_stage


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
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                assert server.poll() is None, (folder / "server.log").read_text(encoding="utf-8")
                assert time.monotonic() < deadline
                time.sleep(0.2)
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
    """A distill run of three stages: one with a model to register, one reused, one that fails."""
    with track(home, "distill", "wise-otter", {"name": "coins", "seeds": [1, 2]}) as parent:
        merged = home / "merging-random-0"
        config = {"check_prompts": 3}
        with track(
            home, "merging", "merging random", config, parent.as_parent, str(merged), student="random"
        ):
            finish_stage(merged, "merging")
        with track(home, "merging", "merging random", config, parent.as_parent, str(merged), reused=True):
            pass
        with (
            pytest.raises(RuntimeError),
            track(home, "training", "training random", config, parent.as_parent, str(home / "gone")),
        ):
            raise RuntimeError("out of memory\nsecond line")


def assert_everything_arrived(client: MlflowClient, experiment: str) -> None:
    parent, merged, reused, failed = runs_of(client, experiment)
    assert parent.data.params == {"name": "coins", "seeds": "[1, 2]"}
    assert {each.info.status for each in (parent, merged, reused)} == {"FINISHED"}
    for child in (merged, reused, failed):
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.data.params == {"check_prompts": "3"}

    assert merged.data.metrics["count/rows"] == 24
    assert merged.data.metrics["max_difference"] == 1e-6
    history = client.get_metric_history(merged.info.run_id, "loss")
    assert [(each.step, each.value) for each in history] == [(n["train_step"], n["loss"]) for n in METRICS]
    assert {each.path for each in client.list_artifacts(merged.info.run_id)} == {
        "config.yaml",
        "manifest.json",
        "model",
    }
    assert {each.path for each in client.list_artifacts(merged.info.run_id, "model")} == {
        "model/adapter",
        "model/curve.png",
        "model/metrics.jsonl",
    }
    (version,) = client.search_model_versions(f"name = '{experiment}-random'")
    assert version.run_id == merged.info.run_id
    assert not client.get_registered_model(f"{experiment}-random").aliases, "no benchmark has measured it"

    assert reused.data.tags["reused"] == "true"
    assert reused.data.metrics["max_difference"] == 1e-6
    assert {each.path for each in client.list_artifacts(reused.info.run_id)} == {
        "config.yaml",
        "manifest.json",
    }

    assert failed.info.status == "FAILED"
    assert failed.data.tags["error"] == "RuntimeError: out of memory second line"


def pending(folder: Path) -> list[Record]:
    records = [
        Record.model_validate_json(path.read_text(encoding="utf-8")) for path in folder.glob("**/tracking/*")
    ]
    return [record for record in records if not record.uploaded]


def test_a_local_store_gets_everything_at_once(store: MlflowClient, tmp_path: Path) -> None:
    track_everything(tmp_path / "runs" / "coins")
    assert_everything_arrived(store, "coins")
    assert pending(tmp_path) == []
    ids = {read_record(path).run_id for path in tmp_path.glob("**/tracking/*.json")}
    assert ids == {run.info.run_id for run in runs_of(store, "coins")}


def test_uploading_twice_makes_no_duplicates(store: MlflowClient, tmp_path: Path) -> None:
    track_everything(tmp_path / "runs" / "coins")
    for path in (tmp_path / "runs").glob("**/tracking/*.json"):
        upload_record(path)
    assert_everything_arrived(store, "coins")
    assert len(store.search_model_versions("name = 'coins-random'")) == 1


@pytest.mark.slow
def test_a_model_is_one_version_however_many_runs_made_it(store: MlflowClient, tmp_path: Path) -> None:
    home = tmp_path / "runs" / "coins"
    merged = home / "merging-random-0"
    for _ in range(2):
        with track(home, "merging", "merging random", {}, None, str(merged), student="random"):
            if not merged.exists():
                finish_stage(merged, "merging")
    assert len(store.search_model_versions("name = 'coins-random'")) == 1


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
    assert len(pending(runs)) == 4

    assert len(upload(runs)) == 4, "still away, so still pending"
    assert len(pending(runs)) == 4

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
            assert run.link == f"{uri}/#/experiments/{shown.info.experiment_id}/runs/{shown.info.run_id}"
    run.update(files=[])
    assert run.link is None, "the server went away"


def test_live_metrics_arrive_while_the_stage_runs_and_once_only(store: MlflowClient, tmp_path: Path) -> None:
    home = tmp_path / "runs" / "coins"
    folder = home / "training-0"
    with track(home, "training", "training random", {}, folder=str(folder)) as run:
        run.forward(folder / "metrics.jsonl")  # does not exist yet
        folder.mkdir(parents=True)
        log = folder / "metrics.jsonl"
        first, second = (json.dumps(line) + "\n" for line in METRICS[:2])
        log.write_text(first + second[:5], encoding="utf-8")  # the second line is being written
        run.forward(log)
        (going_on,) = runs_of(store, "coins")
        assert going_on.info.status == "RUNNING"
        history = store.get_metric_history(going_on.info.run_id, "loss")
        assert [each.step for each in history] == [1]
        log.unlink()
        folder.rmdir()
        finish_stage(folder, "training")
    (ended,) = runs_of(store, "coins")
    history = store.get_metric_history(ended.info.run_id, "loss")
    assert [each.step for each in history] == [1, 2, 3, 4, 5]


def test_a_parent_that_is_still_running_is_created_for_its_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store becomes available between the start of the parent and that of a child, on another machine."""
    uri = f"sqlite:///{tmp_path}/away/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    (tmp_path / "away").touch()
    with track(tmp_path / "here" / "coins", "distill", "wise-otter", {"name": "coins"}) as parent:
        (tmp_path / "away").unlink()
        (tmp_path / "away").mkdir()
        new_store(tmp_path / "away")
        store = MlflowClient(tracking_uri=uri)
        with track(tmp_path / "there" / "coins", "benchmark", "benchmark", {}, parent.as_parent):
            pass
        above, below = runs_of(store, "coins")
        assert (above.info.run_name, above.info.status) == ("wise-otter", "RUNNING")
        assert below.info.status == "FINISHED"
        assert below.data.tags["mlflow.parentRunId"] == above.info.run_id
    assert [each.info.status for each in runs_of(store, "coins")] == ["FINISHED", "FINISHED"]


def test_a_stage_without_the_variable_takes_the_store_of_its_parent(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with track(tmp_path / "coins", "distill", "wise-otter", {}) as parent:
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        with track(tmp_path / "worker" / "coins", "training", "training", {}, parent.as_parent):
            pass
    assert len(runs_of(store, "coins")) == 2
    assert not (tmp_path / "worker" / "mlflow.db").exists()


def test_a_store_that_is_not_the_parents_is_an_error_before_any_work(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    others = [new_store(tmp_path / "other"), f"sqlite:///{tmp_path}/none.db"]
    with track(tmp_path / "coins", "distill", "wise-otter", {}) as parent:
        for other in others:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
            with (
                pytest.raises(StoreError, match="unset it") as error,
                track(tmp_path / "worker", "training", "training", {}, parent.as_parent),
            ):
                pytest.fail("work began")
            assert {other, tracking_uri_of(parent)} <= set(re.findall(r"sqlite:[^, :]*", str(error.value)))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri_of(parent))
    assert not (tmp_path / "none.db").exists()
    assert not (tmp_path / "worker").exists()


def tracking_uri_of(run: Run) -> str:
    return run.as_parent.tracking_uri


def test_a_store_has_several_addresses(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with track(tmp_path / "coins", "distill", "wise-otter", {}) as parent:
        (tmp_path / "mounted").symlink_to(tmp_path)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mounted/mlflow.db")
        with track(tmp_path / "coins", "training", "training", {}, parent.as_parent):
            pass
    assert len(runs_of(store, "coins")) == 2


def test_a_file_of_another_machine_is_no_store_here(tmp_path: Path) -> None:
    elsewhere = Parent(
        record="a", name="wise-otter", started=0, tracking_uri="sqlite:////gone/mlflow.db", host="node-a"
    )
    with (
        pytest.raises(StoreError, match="a file of node-a.* start `mlflow server` there"),
        track(tmp_path / "coins", "training", "training", {}, elsewhere),
    ):
        pytest.fail("work began")


def test_a_cancelled_run_is_killed(store: MlflowClient, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), track(tmp_path / "coins", "training", "training", {}):
        raise KeyboardInterrupt
    assert [each.info.status for each in runs_of(store, "coins")] == ["KILLED"]


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


def test_the_ui_is_one_line(store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    assert how_to_open().endswith(f"mlflow ui --backend-store-uri {tracking_uri()}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000/")
    assert how_to_open() == "http://localhost:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert tracking_uri() == f"sqlite:///{Path.cwd()}/mlflow.db"


def test_a_local_run_links_to_the_ui_to_be_opened(store: MlflowClient, tmp_path: Path) -> None:
    with track(tmp_path / "coins", "distill", "wise-otter", {}) as run:
        (shown,) = runs_of(store, "coins")
        page = f"/#/experiments/{shown.info.experiment_id}/runs/{shown.info.run_id}"
        assert run.link == f"http://127.0.0.1:5000{page}"


def away(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished record that is not uploaded yet."""
    before = os.environ["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    with track(home, "distill", "waits", {}) as run:
        pass
    monkeypatch.setenv("MLFLOW_TRACKING_URI", before)
    return run.path


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


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


def test_a_process_that_took_over_the_number_of_a_killed_one_is_not_it(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = away(tmp_path / "coins", monkeypatch)
    change(path, status="RUNNING", started=1_000_000)  # this process began later than 1970
    assert upload(tmp_path) == []
    assert [each.info.status for each in runs_of(store, "coins")] == ["KILLED"]


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


def test_params_that_mlflow_would_refuse_are_renamed(store: MlflowClient, tmp_path: Path) -> None:
    with track(tmp_path / "coins", "distill", "odd", {"a/../b": 1, "c=d": {"é?": 2}}):
        pass
    (run,) = runs_of(store, "coins")
    assert run.info.status == "FINISHED"
    assert run.data.params == {"a_.._b": "1", "c_d.é_": "2"}


def test_what_ended_the_work_is_seen_though_the_disk_is_full(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full_disk(path: Path, record: Record) -> None:
        raise OSError(28, "No space left on device", str(path))

    def work() -> None:
        with track(tmp_path / "coins", "training", "t", {}):
            monkeypatch.setattr("tasks.tracking.run.write_record", full_disk)
            raise RuntimeError("loss is NaN")

    with pytest.raises(RuntimeError, match="loss is NaN"):
        work()
    assert "still says that the run goes on (OSError: [Errno 28] No space left on device" in caplog.text


def test_nothing_is_asked_of_the_store_while_there_is_no_new_line(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "metrics.jsonl"
    sent: list[int] = []
    with track(tmp_path / "coins", "training", "t", {}) as run:
        monkeypatch.setattr(
            "tasks.tracking.run.log_lines", lambda *arguments: sent.append(len(arguments[-1]))
        )
        run.forward(log)
        log.write_text("".join(json.dumps(line) + "\n" for line in METRICS[:2]), encoding="utf-8")
        for _ in range(3):
            run.forward(log)
    assert sent == [2]


STUDENT = "student/random"


def track_merging(home: Path, seed: int = 0) -> Path:
    """The folder of a finished merging of the student, which is registered."""
    merged = home / f"merging-random-{seed}"
    Stage("merging", MergingConfig(check_prompts=seed + 1), {}, merged).finish([])
    with track(home, "merging", "merging random", {}, folder=str(merged), student="random"):
        pass
    return merged


def track_benchmark(folder: Path, merged: Path, keeping: list[str], beside: Sequence[Path] = ()) -> None:
    """A finished benchmark of the student in `merged`, as one of the experiment's benchmarks `beside`."""
    if not folder.exists():
        stage = Stage("benchmark", MergingConfig(), {STUDENT: merged}, folder)
        stage.finish([], details={"students_that_keep_the_accuracy": keeping})
    benchmarks = [str(other) for other in beside]
    with track(folder.parent, "benchmark", "benchmark", {}, folder=str(folder), benchmarks=benchmarks):
        pass


def candidate(store: MlflowClient) -> int | None:
    """Version of the candidate among the student's models."""
    version = store.get_registered_model("coins-random").aliases.get(ALIAS)
    return None if version is None else int(version)


def test_only_a_student_that_keeps_the_accuracy_becomes_the_candidate(
    store: MlflowClient, tmp_path: Path
) -> None:
    home = tmp_path / "runs" / "coins"
    merged, _ = track_merging(home), track_merging(home, seed=1)
    track_benchmark(home / "benchmark-lost", merged, [])
    assert candidate(store) is None
    track_benchmark(home / "benchmark-kept", merged, [STUDENT])
    first = min(store.search_model_versions("name = 'coins-random'"), key=lambda each: int(each.version))
    assert candidate(store) == int(first.version), "the version that was measured, not the newest"


def test_a_candidate_keeps_the_accuracy_in_all_benchmarks(store: MlflowClient, tmp_path: Path) -> None:
    """The last one to finish nominates, also by itself; a benchmark of another model does not count."""
    home = tmp_path / "runs" / "coins"
    merged, other = track_merging(home), track_merging(home, seed=1)
    easy, hard, mended = (home / f"benchmark-{name}" for name in ("easy", "hard", "mended"))
    track_benchmark(easy, merged, [STUDENT], beside=[easy, hard])
    assert candidate(store) is None, "the other benchmark is not finished"
    track_benchmark(hard, merged, [], beside=[easy, hard])
    assert candidate(store) is None, "it does not keep the accuracy there"
    track_benchmark(mended, other, [STUDENT], beside=[easy, mended])
    assert candidate(store) is None, "no model kept it in both"
    track_benchmark(home / "benchmark-again", merged, [STUDENT], beside=[easy, home / "benchmark-again"])
    assert candidate(store) == 1


def test_benchmarks_that_are_uploaded_later_nominate(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "runs" / "coins"
    folders = [home / f"benchmark-{name}" for name in "ab"]
    with monkeypatch.context() as unreachable:
        unreachable.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        merged = track_merging(home)
        for folder in folders:
            track_benchmark(folder, merged, [STUDENT], beside=folders)
    assert not store.search_registered_models()
    assert upload(tmp_path) == []
    assert candidate(store) == 1


def test_a_reused_benchmark_nominates_when_the_others_are_finished(
    store: MlflowClient, tmp_path: Path
) -> None:
    """As after a run that ended between a stage and its upload."""
    home = tmp_path / "runs" / "coins"
    merged = track_merging(home)
    folders = [home / f"benchmark-{name}" for name in "ab"]
    track_benchmark(folders[0], merged, [STUDENT], beside=folders)
    stage = Stage("benchmark", MergingConfig(), {STUDENT: merged}, folders[1])
    stage.finish([], details={"students_that_keep_the_accuracy": [STUDENT]})
    track_benchmark(folders[0], merged, [STUDENT], beside=folders)
    assert candidate(store) == 1
