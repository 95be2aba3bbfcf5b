import contextlib
import re
import socket
from pathlib import Path

import pytest
from mlflow import MlflowClient

from dparallel.config.base import ConfigError
from tasks.tracking.records import Parent, StoreError
from tasks.tracking.run import track
from tasks.tracking.store import check_store
from tests.stores import new_store
from tests.tasks.tracking.helpers import runs_of, tracking_uri_of


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


def test_a_store_has_several_addresses(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with track(tmp_path / "coins", "distill", "wise-otter", {}) as parent:
        (tmp_path / "mounted").symlink_to(tmp_path)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mounted/mlflow.db")
        with track(tmp_path / "coins", "training", "training", {}, parent.as_parent):
            pass
    assert len(runs_of(store, "coins")) == 2


@pytest.mark.parametrize(
    "uri",
    [
        "{0}/mlruns",
        "file://{0}/mlruns",
        "file:%2e%2e/mlruns",
        "sqlite+pysqlite:///{0}/other.db",
        "sqlite:///{0}/other.db?uri=true",
        "sqlite:///{0}/%2e%2e/other.db",
        "sqlite+pysqlite:///file:{0}/other.db?uri=true",
        "http_{0}",
    ],
)
def test_other_forms_of_stores_are_refused_where_folders_are_limited(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    parent = Parent(record="a", name="a", started=0, tracking_uri=uri.format(tmp_path), host="h")
    monkeypatch.setenv("DPARALLEL_ROOTS", str(tmp_path))
    with pytest.raises(ConfigError, match="parent.tracking_uri=.* takes no other form"):
        check_store(parent)
    for server in (
        "http://host:5000",
        "https://host/mlflow",
        "postgresql://me@host/db",
        "mysql+pymysql://h/db",
    ):
        with contextlib.suppress(StoreError):  # whether it has the run is another question
            check_store(parent.model_copy(update={"tracking_uri": server}))


@pytest.mark.parametrize("uri", ["sqlite:///{0}/other.db"])
def test_a_store_outside_of_the_folders_of_a_worker(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DPARALLEL_ROOTS", str(tmp_path / "inside"))
    here = socket.gethostname()
    outside = Parent(record="a", name="wise-otter", started=0, tracking_uri=uri.format(tmp_path), host=here)
    with (
        pytest.raises(ConfigError, match="tracking_uri=.*outside of the folders"),
        track(tmp_path / "coins", "training", "training", {}, outside),
    ):
        pytest.fail("work began")
    monkeypatch.setenv("DPARALLEL_ROOTS", str(tmp_path))
    check_store(outside)


def test_a_file_of_another_machine_is_no_store_here(tmp_path: Path) -> None:
    elsewhere = Parent(
        record="a", name="wise-otter", started=0, tracking_uri="sqlite:////gone/mlflow.db", host="node-a"
    )
    with (
        pytest.raises(StoreError, match="a file of node-a.* start `mlflow server` there"),
        track(tmp_path / "coins", "training", "training", {}, elsewhere),
    ):
        pytest.fail("work began")
