"""Passwords in the address of the store are in no record, parameter, link or message."""

import logging
from pathlib import Path

import pytest

from tasks.tracking import links
from tasks.tracking.records import Parent, StoreError, tracking_uri, without_password
from tasks.tracking.run import track
from tasks.tracking.store import check_store

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        (f"postgresql://me:{SECRET}@host:5432/db", "postgresql://me@host:5432/db"),
        (f"https://me:{SECRET}@host/path", "https://me@host/path"),
        (f"https://me:{SECRET}@home@host/path", "https://me@host/path"),
        (f"https://:{SECRET}@host", "https://@host"),
        (f"postgresql+psycopg2://me:{SECRET}/7@host/db", "postgresql+psycopg2://me@host/db"),
        (
            f"postgresql://host/db?user=me&password={SECRET}&a=b",
            "postgresql://host/db?user=me&password=…&a=b",
        ),
        (f"https://{SECRET}@host/path", "https://…@host/path"),
        (f"https://host/path?a=b&api_key={SECRET}&Token={SECRET}", "https://host/path?a=b&api_key=…&Token=…"),
        (f"mysql://host/db?passwd={SECRET}", "mysql://host/db?passwd=…"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("http://host:5000", "http://host:5000"),
        ("postgresql://me@host:5432/db", "postgresql://me@host:5432/db"),
        ("sqlite:////folder/a:b@c/mlflow.db", "sqlite:////folder/a:b@c/mlflow.db"),
    ],
)
def test_without_password(uri: str, expected: str) -> None:
    assert without_password(uri) == expected


def test_a_run_leaves_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    address = f"http://me:{SECRET}@127.0.0.1:9"  # where nothing listens
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    caplog.set_level(logging.DEBUG)
    with track(tmp_path / "sums", "distill", "sums", {}) as run:
        parent = run.as_parent
    assert tracking_uri(parent) == address, "whoever connects has it from the environment"
    check_store(parent)
    written = [file.read_text(encoding="utf-8") for file in (tmp_path / "sums").rglob("*.json")]
    assert len(written) == 1
    shown = [*written, caplog.text, parent.model_dump_json(), links.ui_command(address)]
    shown += links.how_to_open(run.record)
    assert "did not accept the run" in caplog.text
    assert SECRET not in "\n".join(shown)
    other = parent.model_copy(update={"tracking_uri": "sqlite:////absent.db"})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(StoreError, match="is in sqlite:////absent.db"):
        check_store(Parent.model_validate(other))
