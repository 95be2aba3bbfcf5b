"""Stores that cannot be used are refused in one line that names the remedy."""

import importlib
from pathlib import Path
from typing import Any

import pytest

from dparallel.stages.storage import remote
from dparallel.stages.storage.remote import Remote, StorageError
from tests.dparallel.stages.storage.conftest import NewStorage


def test_objects(new_storage: NewStorage, tmp_path: Path) -> None:
    store = new_storage("here").remote
    store.check()
    assert store.sizes("") == {}, "nothing is left of the check"
    assert store.read("a/b") is None
    assert store.create("a/b", b"1")
    assert not store.create("a/b", b"2")
    assert store.read("a/b") == b"1"
    store.write("a/b", b"22")
    assert store.sizes("a") == {"b": 2}
    assert store.digest("a/b") == "785f3ec7eb32f30b90cd0fcf3657d388b5ff4297f2f9716ff66e9b69c05ddd09"
    (tmp_path / "file").write_bytes(b"333")
    store.upload(tmp_path / "file", "a/c/d", "")
    assert store.sizes("") == {"a/b": 2, "a/c/d": 3}
    assert store.download("a/c/d", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"333"
    assert not store.download("a/none", tmp_path / "copy")
    store.remove(["a/b", "a/none"])
    assert store.sizes("") == {"a/c/d": 3}


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, *arguments: Any) -> Any:
        if name == "s3fs":
            raise ImportError(name)
        return importlib.__import__(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(StorageError, match=r"s3://bucket needs s3fs, .*: pip install 'dparallel\[s3\]'$"):
        Remote("s3://bucket").check()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StorageError, match="file/store cannot be used .*: check the folder, its permissions"):
        Remote(str(tmp_path / "file" / "store")).check()


def test_an_unknown_kind() -> None:
    with pytest.raises(StorageError, match="ftp://host/a: no store of this kind is known"):
        Remote("ftp://host/a")


def test_an_endpoint_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://host:port")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    with pytest.raises(
        StorageError, match="s3://bucket/a cannot be .*: write the endpoint as http://HOST:PORT"
    ):
        Remote("s3://bucket/a").check()


class Refused(OSError):
    """As a server says that it is busy."""


def test_what_may_pass_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    store = Remote("s3://bucket")
    answers = [Refused("busy"), Refused("busy"), b"1"]

    def read(name: str) -> bytes:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(store, "_read", read)
    assert store.read("a") == b"1"
    assert waits == list(remote.WAITS[:2])
    answers = [PermissionError("Forbidden")] * 2
    with pytest.raises(StorageError, match="s3://bucket/a cannot be read .Forbidden.: check AWS_ACCESS_KEY"):
        store.read("a")
    assert len(waits) == 2, "a refusal does not pass"
