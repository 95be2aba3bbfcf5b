"""Two flows with the same stage: the second one waits, and uses the result of the first one."""

import logging
import threading
import time
from pathlib import Path

import httpx
import pytest

from dparallel.stages import lease
from dparallel.stages.manifest import Manifest
from tasks import stages
from tasks.tracking.records import Record
from tasks.tracking.run import Run
from tests.tasks.conftest import finish_stage

MADE = Manifest(
    stage="training", config={}, inputs={}, files={}, seconds=1.0, finished_at="2026-11-26T00:00:00+00:00"
)


@pytest.fixture(autouse=True)
def logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(stages, "get_run_logger", lambda: logging.getLogger("a_run"))
    return caplog


def test_work_waits_for_the_run_that_is_in_the_folder(tmp_path: Path, logged) -> None:
    (tmp_path / "stage.json").write_text("{}", encoding="utf-8")
    order: list[str] = []
    begun = threading.Event()

    def first() -> None:
        with lease.held(tmp_path):
            begun.set()
            deadline = time.monotonic() + 60
            while "is in use by process" not in logged.text and time.monotonic() < deadline:
                time.sleep(0.01)
            order.append("first")

    def second() -> Manifest:
        order.append("second")
        return MADE

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(10)
    assert stages.when_free(str(tmp_path), second) == MADE
    thread.join()
    assert order == ["first", "second"]
    assert f"{tmp_path} is in use by process" in logged.text


def test_work_that_is_refused_waits_again(tmp_path: Path) -> None:
    """A third run was faster."""
    finish_stage(tmp_path / "stage", "merging")
    tries: list[str] = []

    def work() -> Manifest:
        tries.append("")
        if len(tries) < 3:
            raise lease.LeaseHeldError("is in use by another")
        return MADE

    assert stages.when_free(str(tmp_path / "stage"), work) == MADE
    assert len(tries) == 3


def test_a_stage_is_finished_though_prefects_server_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged
) -> None:
    def refused(*arguments: object, **options: object) -> None:
        raise httpx.ConnectError("connection refused")

    monkeypatch.setattr(stages, "create_markdown_artifact", refused)
    made = {"experiment": "small", "stage": "training", "name": "training fast", "config": {}}
    record = Record(id="1", parent=None, started=0, **made)
    stages.publish("small", "training fast", "a table", Run(tmp_path / "1.json", record))
    assert "small: training fast is not shown in Prefect, whose server does not answer" in logged.text
