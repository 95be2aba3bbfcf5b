"""Errors that go away by themselves: a task is tried again after them, and after no others."""

import errno
import os
from pathlib import Path

import pytest
from prefect import flow

from dparallel.config.base import ConfigError
from dparallel.stages.files import FileError
from tasks import retries
from tasks.launch import TrainingFailed
from tasks.retries import is_transient, resumable_task


def caused_by(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def failed_with(number: int) -> OSError:
    return OSError(number, os.strerror(number), "part-00001.parquet")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (failed_with(errno.ESTALE), True),
        (failed_with(errno.EIO), True),
        (caused_by(FileError("cannot be written"), failed_with(errno.ETIMEDOUT)), True),
        (caused_by(RuntimeError(), caused_by(ValueError(), ConnectionRefusedError())), True),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), False),
        (caused_by(ConfigError("no access to the Hub"), ConnectionError("offline mode")), False),
        (failed_with(errno.ENOSPC), False),
        (failed_with(errno.EACCES), False),
        (failed_with(errno.ENOENT), False),
        (caused_by(FileError("cannot be written"), failed_with(errno.ENOSPC)), False),
        (ConfigError("training.seed=-1"), False),
        (TrainingFailed("exit code 1"), False),
        (MemoryError(), False),
        (AssertionError(), False),
    ],
)
def test_which_errors_are_transient(error: BaseException, expected: bool) -> None:
    assert is_transient(error) == expected


def test_causes_that_lead_back_to_the_error() -> None:
    one, other = ValueError(), ValueError()
    one.__cause__, other.__cause__ = other, one
    assert not is_transient(one)


@pytest.mark.parametrize(("error", "tries"), [(failed_with(errno.ESTALE), 3), (failed_with(errno.ENOSPC), 1)])
def test_a_task_is_tried_again_after_a_transient_error(
    error: OSError, tries: int, tmp_path: Path, monkeypatch, prefect_server: None
) -> None:
    monkeypatch.setattr(retries, "DELAYS", [0.0, 0.0])
    done: list[str] = []

    @resumable_task("record")
    def record(folder: Path) -> str:
        done.append("")
        if len(done) < 3:
            raise error
        return "recorded"

    @flow
    def recording() -> str:
        return record(tmp_path)

    if tries == 3:
        assert recording() == "recorded"
    else:
        with pytest.raises(OSError, match="No space left"):
            recording()
    assert len(done) == tries
