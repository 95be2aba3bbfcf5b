"""A store that is a file has all its tables from the first moment, whoever makes it."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tasks.tracking.database import make_database

MAKING = "import sys; from tasks.tracking.database import make_database; make_database(sys.argv[1])"


def tables(path: Path) -> set[str]:
    connection = sqlite3.connect(path)
    try:
        return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    finally:
        connection.close()


@pytest.mark.slow
def test_a_new_database_is_mlflows_own_and_an_old_one_stays(tmp_path: Path) -> None:
    path, own = tmp_path / "mlflow.db", tmp_path / "own.db"
    make_database(f"sqlite:///{path}")
    made = MlflowClient(tracking_uri=f"sqlite:///{path}")
    assert MlflowClient(tracking_uri=f"sqlite:///{own}").get_experiment("0") is not None
    assert tables(path) == tables(own)
    experiment = made.create_experiment("kept")
    make_database(f"sqlite:///{path}")
    assert made.get_experiment(experiment).name == "kept"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["mlflow.db", "own.db"]


def test_stores_that_are_no_new_files_are_left_to_mlflow(tmp_path: Path) -> None:
    for uri in ("http://127.0.0.1:9", "postgresql://me@host/db", f"sqlite:///{tmp_path}/absent/mlflow.db"):
        make_database(uri)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_processes_that_begin_at_once_share_one_whole_database(tmp_path: Path) -> None:
    """Three begin together, and one of them is killed as soon as it makes something."""
    path = tmp_path / "mlflow.db"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-c", MAKING, f"sqlite:///{path}"]
    with subprocess.Popen(command, env={**os.environ, "TMPDIR": str(scratch)}) as killed:
        others = [subprocess.Popen(command) for _ in range(2)]
        end = time.monotonic() + 120
        while not list(scratch.glob("*/mlflow.db")) and killed.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
        assert [other.wait(120) for other in others] == [0, 0]
    client = MlflowClient(tracking_uri=f"sqlite:///{path}")
    assert client.get_experiment(client.create_experiment("first")).name == "first"
    assert not any(name.startswith("_alembic_tmp") for name in tables(path))
    assert [each.name for each in tmp_path.glob("*.db*")] == ["mlflow.db"]
