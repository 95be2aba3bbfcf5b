"""What a stage made, and the rules that make repeating it safe.

A stage's folder holds its files, `stage.json` (what it is made from, written first) and
`manifest.json` (what was made, written last and atomically). No manifest, no result.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from dparallel.config.base import UserError
from dparallel.stages.files import write_atomically

CLAIM, MANIFEST = "stage.json", "manifest.json"
# What a model is and how it is spoken to: weights, config, tokenizer (merges.txt), chat templates.
WEIGHTS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*/*.jinja")


class StageError(UserError):
    """A stage's folder that is missing, foreign or damaged; the message names it and the remedy."""


class FileRecord(BaseModel):
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """`inputs` maps each input's name to its fingerprint; `files` lists the results only."""

    model_config = ConfigDict(frozen=True)

    stage: str
    config: dict[str, Any]
    inputs: dict[str, str]
    files: dict[str, FileRecord]
    counts: dict[str, int] = {}
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {}
    versions: dict[str, str] = {}
    seconds: float
    finished_at: str

    @property
    def fingerprint(self) -> str:
        """The same for the same content made from the same things, whenever it was made."""
        files = {name: record.sha256 for name, record in self.files.items()}
        return digest({**_claim(self.stage, self.config, self.inputs), "files": files})


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, keys in order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file; an unchanged file (size and time) is read once per process."""
    status = path.stat()
    return _file_digest(path.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=10_000)
def _file_digest(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: str | Path) -> str:
    """Fingerprint of an input: a stage's folder by its (verified) manifest, a model's by its files."""
    folder = Path(path)
    if (folder / MANIFEST).is_file():
        return verify(folder).fingerprint
    if (folder / CLAIM).is_file():
        raise StageError(f"{folder} is unfinished (no {MANIFEST}): run its stage again to complete it")
    if not folder.is_dir():
        raise StageError(f"{folder}: no such folder (looked in {Path.cwd()})")
    files = sorted({file for pattern in WEIGHTS for file in folder.glob(pattern)})
    if not files:
        raise StageError(f"{folder} holds neither a {MANIFEST} nor a model (*.safetensors, config.json)")
    return digest({file.relative_to(folder).as_posix(): file_digest(file) for file in files})


def read_manifest(folder: str | Path, stage: str | None = None) -> Manifest:
    """The manifest of a finished stage; `StageError` where there is none or it is another stage's."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise StageError(f"{folder}: no {MANIFEST}, so no finished stage; run the stage that makes it")
    manifest = Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    if stage is not None and manifest.stage != stage:
        raise StageError(f"{folder} was made by stage {manifest.stage!r}, expected {stage!r}")
    return manifest


def verify(folder: str | Path, stage: str | None = None) -> Manifest:
    """Read the manifest and hash every file it lists; `StageError` names the first that differs."""
    manifest = read_manifest(folder, stage)
    for name, record in manifest.files.items():
        path = Path(folder) / name
        if not path.is_file():
            raise StageError(f"{path} is missing though {MANIFEST} lists it; delete {folder} and rerun")
        if path.stat().st_size != record.bytes or file_digest(path) != record.sha256:
            raise StageError(
                f"{path} does not match {MANIFEST} (damaged or edited); delete {folder} and rerun"
            )
    return manifest


class Stage:
    """One stage's work in its folder: `done` if finished before, else `finish` writes the manifest."""

    def __init__(self, name: str, config: BaseModel, inputs: Mapping[str, str | Path], out_dir: str | Path):
        """Claim `out_dir`; `StageError` if it belongs to another configuration or to other inputs."""
        self.name = name
        self.config = config.model_dump(mode="json")
        self.inputs = {key: fingerprint(path) for key, path in inputs.items()}
        self.folder = Path(out_dir)
        self.started = time.perf_counter()
        claim = _claim(self.name, self.config, self.inputs)
        path = self.folder / CLAIM
        if path.is_file():
            _refuse_to_mix(self.folder, json.loads(path.read_text(encoding="utf-8")), claim)
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise StageError(f"{self.folder} is not empty and not a stage's folder; choose another")
        else:
            write_atomically(path, json.dumps(claim, indent=1))

    @property
    def done(self) -> Manifest | None:
        """The verified manifest if this stage is finished, else None."""
        return verify(self.folder, self.name) if (self.folder / MANIFEST).is_file() else None

    def finish(
        self,
        files: Iterable[str],
        counts: dict[str, int] | None = None,
        metrics: dict[str, float] | None = None,
        details: dict[str, Any] | None = None,
    ) -> Manifest:
        """Hash `files` (relative paths) and write the manifest."""
        paths = {name: self.folder / name for name in sorted(files)}
        manifest = Manifest(
            stage=self.name,
            config=self.config,
            inputs=self.inputs,
            files={
                name: FileRecord(bytes=path.stat().st_size, sha256=file_digest(path))
                for name, path in paths.items()
            },
            counts=counts or {},
            metrics=metrics or {},
            details=details or {},
            versions={name: version(name) for name in ("dparallel", "torch", "transformers")},
            seconds=time.perf_counter() - self.started,
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        write_atomically(self.folder / MANIFEST, manifest.model_dump_json(indent=1))
        return manifest


def _claim(stage: str, config: dict, inputs: dict[str, str]) -> dict[str, Any]:
    return {"stage": stage, "config": config, "inputs": inputs}


def _refuse_to_mix(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    if there == here:
        return
    old, new = dict(_flat(there)), dict(_flat(here))
    changed = [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} now"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
    raise StageError(
        f"{folder} was begun with other settings ({'; '.join(changed[:5])}); choose another folder"
    )


def _flat(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _flat(each, f"{prefix}{key}.")
    else:
        yield prefix.rstrip("."), value
