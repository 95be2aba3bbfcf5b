from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from dparallel.stages.files import write_atomically
from dparallel.stages.manifest import CLAIM, MANIFEST, FileRecord, Manifest, file_digest
from dparallel.stages.storage.folders import Storage

NewStorage = Callable[[str], Storage]


@pytest.fixture(params=["folder", "memory"])
def new_storage(request: pytest.FixtureRequest, tmp_path: Path) -> NewStorage:
    """The same store for machines by name, each with its own folder of runs."""
    url = str(tmp_path / "store") if request.param == "folder" else f"memory://{uuid4().hex}/store"
    return lambda machine: Storage(url, tmp_path / machine / "runs")


def finish(folder: Path, files: dict[str, bytes], seconds: float = 1.0) -> Manifest:
    """Make a finished stage of these files."""
    for name, content in files.items():
        write_atomically(folder / name, content)
    write_atomically(folder / CLAIM, "{}")
    records = {
        name: FileRecord(bytes=len(content), sha256=file_digest(folder / name))
        for name, content in files.items()
    }
    made = Manifest(
        stage="training",
        config={},
        inputs={},
        files=records,
        seconds=seconds,
        finished_at="2026-11-26T00:00:00+00:00",
    )
    write_atomically(folder / MANIFEST, made.model_dump_json())
    return made


def content_of(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
