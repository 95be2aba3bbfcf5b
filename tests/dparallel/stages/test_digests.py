"""A large file is read once on a machine, and again when it changed."""

import os
from pathlib import Path

import pytest

from dparallel.stages import digests, manifest
from dparallel.stages.manifest import file_digest


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of a machine that remembers nothing yet."""
    monkeypatch.setenv("DPARALLEL_CACHE", str(tmp_path / "cache"))
    new_process(monkeypatch)
    file = tmp_path / "large"
    file.write_bytes(b"a" * digests.LARGE)
    return file


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process remembers without the record on disk."""
    monkeypatch.setattr(digests, "_known", {})
    monkeypatch.setattr(digests, "_read_to", 0)
    manifest._file_digest.cache_clear()


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The digests that are computed from now on."""
    computed: list[str] = []
    hashed = manifest.hashlib.file_digest  # type: ignore[attr-defined]

    def counted(*arguments):
        computed.append("")
        return hashed(*arguments)

    monkeypatch.setattr(manifest.hashlib, "file_digest", counted)  # type: ignore[attr-defined]
    return computed


def test_other_processes_know_it(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = reads(monkeypatch)
    first = file_digest(large)
    new_process(monkeypatch)
    large.rename(tmp_path / "moved")
    assert file_digest(tmp_path / "moved") == first
    assert len(computed) == 1


def test_a_changed_file_is_read_again(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = file_digest(large)
    for change in (b"b" * digests.LARGE, b"a" * (digests.LARGE + 1)):
        new_process(monkeypatch)
        large.write_bytes(change)
        os.utime(large, ns=(1, len(change)))
        assert file_digest(large) != first


def test_a_damaged_or_missing_record_costs_time_only(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = file_digest(large)
    record = tmp_path / "cache" / "digests"
    for damage in (b"\xff\xfe", record.read_bytes()[:-3], b"x\n"):
        record.write_bytes(damage)
        new_process(monkeypatch)
        assert file_digest(large) == first
    monkeypatch.setenv("DPARALLEL_CACHE", str(large))  # a file: no folder can be made there
    new_process(monkeypatch)
    assert file_digest(large) == first
