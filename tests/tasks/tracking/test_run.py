import json
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tasks.tracking.records import Record, read_record
from tasks.tracking.run import track
from tests.tasks.conftest import METRICS, finish_stage
from tests.tasks.tracking.helpers import assert_everything_arrived, pending, runs_of, track_everything


def test_a_local_store_gets_everything_at_once(store: MlflowClient, tmp_path: Path) -> None:
    track_everything(tmp_path / "runs" / "coins")
    assert_everything_arrived(store, "coins")
    assert pending(tmp_path) == []
    ids = {read_record(path).run_id for path in tmp_path.glob("**/tracking/*.json")}
    assert ids == {run.info.run_id for run in runs_of(store, "coins")}


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


def test_a_cancelled_run_is_killed(store: MlflowClient, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), track(tmp_path / "coins", "training", "training", {}):
        raise KeyboardInterrupt
    assert [each.info.status for each in runs_of(store, "coins")] == ["KILLED"]


def test_params_that_mlflow_would_refuse_are_renamed(store: MlflowClient, tmp_path: Path) -> None:
    with track(tmp_path / "coins", "distill", "odd", {}, params={"a/../b": "1", "c=d.é?": "2"}):
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


def test_metrics_have_the_times_at_which_they_were_written(store: MlflowClient, tmp_path: Path) -> None:
    """Those of earlier versions have none: theirs are a function of the step."""
    folder = tmp_path / "coins" / "training-0"
    with track(tmp_path / "coins", "training", "t", {}, folder=str(folder)) as run:
        finish_stage(folder, "training")
        lines = [{"train_step": 6, "loss": 0.1, "time": 1_700_000_000.25}, {"train_step": 7, "loss": 0.0}]
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as log:
            log.write("".join(json.dumps(line) + "\n" for line in lines))
    (ended,) = runs_of(store, "coins")
    times = {each.step: each.timestamp for each in store.get_metric_history(ended.info.run_id, "loss")}
    assert (times[6], times[7]) == (1_700_000_000_250, run.record.started + 7)
    assert "time" not in ended.data.metrics


def test_a_reused_stage_comes_whole_into_a_store_that_lacks_it(store: MlflowClient, tmp_path: Path) -> None:
    folder = tmp_path / "coins" / "training-0"
    finish_stage(folder, "training")
    for _ in range(2):
        with track(tmp_path / "coins", "training", "t", {}, folder=str(folder), reused=True) as run:
            pass
    (only,) = runs_of(store, "coins")
    assert only.info.run_name == "t (reused)"
    assert only.data.tags["reused"] == "true"
    assert only.data.metrics["count/rows"] == 24
    assert run.link is not None
    assert only.info.run_id in run.link


def test_the_end_says_in_one_line_what_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    home = tmp_path / "runs" / "coins"
    with track(home, "distill", "wise-otter", {}) as parent, track(home, "t", "t", {}, parent.as_parent):
        pass
    assert caplog.messages[-1] == (
        f"2 runs wait for MLflow; upload them with: python -m tasks.tracking upload {home}"
    )


def test_the_end_uploads_what_waits(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The store was away during a stage."""
    home, there = tmp_path / "runs" / "coins", tmp_path / "mlflow.db"
    with track(home, "distill", "wise-otter", {}) as parent:
        there.rename(tmp_path / "hidden")
        there.mkdir()
        with track(home, "training", "t", {}, parent.as_parent):
            pass
        there.rmdir()
        (tmp_path / "hidden").rename(there)
        assert len(pending(tmp_path)) == 2
    assert pending(tmp_path) == []
    assert [each.info.status for each in runs_of(store, "coins")] == ["FINISHED", "FINISHED"]
    assert "wait for MLflow" not in caplog.text


def test_the_load_of_the_machine_is_logged(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.tracking.run.SAMPLING_SECONDS", 0.05)
    with track(tmp_path / "coins", "training", "t", {}, monitored=True):
        deadline = time.monotonic() + 30
        while "system/cpu_utilization_percentage" not in runs_of(store, "coins")[0].data.metrics:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_run_that_waited_for_its_twin_says_so(store: MlflowClient, tmp_path: Path) -> None:
    folder = tmp_path / "coins" / "training-0"
    with track(tmp_path / "coins", "training", "waits", {}, folder=str(folder)) as waits:
        with track(tmp_path / "coins", "training", "makes", {}, folder=str(folder)):
            finish_stage(folder, "training")
        waits.record = waits.record.model_copy(update={"reused": True})
    runs = {run.info.run_name: run for run in runs_of(store, "coins")}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert {name: run.data.tags["reused"] for name, run in runs.items()} == {
        "waits": "true",
        "makes": "false",
    }
