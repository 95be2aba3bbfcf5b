"""Manifests: what a stage was made from and what it produced, so that repeating a stage is safe.

A stage's folder holds its files, `stage.json` (what it is made from, written first) and `manifest.json` (what
was made, written last and atomically). A stage without manifest is unfinished.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from dparallel.config.base import Config, UserError, explain
from dparallel.config.problems import ProblemsConfig
from dparallel.rules.declaration import COMMIT_RULE
from dparallel.stages import digests
from dparallel.stages.files import PARTIAL, is_there, write_atomically
from dparallel.stages.generation_file import EMPTY, GENERATION, without_defaults
from dparallel.stages.origin import Origin, versions

log = logging.getLogger(__name__)

CLAIM, MANIFEST = "stage.json", "manifest.json"
# Files that define a model and its prompts: weights, config, tokenizer (with merges.txt), chat templates.
WEIGHTS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*/*.jinja")


class StageError(UserError):
    """A stage's folder is missing, damaged or belongs to something else; the message names the remedy."""


class FileRecord(BaseModel):
    """Size and SHA-256 of a file."""

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What a finished stage was made from and what it produced.

    Attributes:
        config: the settings that determine the result.
        how: the other settings, as used in this run.
        inputs: fingerprints of the inputs, by name.
        code: digest of the code that made the result.
        origin: the run that made the result: config file, overrides, flow run, commit, hardware.
        files: the result files, by path relative to the folder.
        seconds: wall time of the run that finished the stage.
        finished_at: time with its offset from UTC, in ISO 8601.
    """

    model_config = ConfigDict(frozen=True)

    stage: str
    config: dict[str, Any]
    how: dict[str, Any] = {}
    inputs: dict[str, str]
    code: str | None = None
    origin: dict[str, Any] = {}
    files: dict[str, FileRecord]
    counts: dict[str, int] = {}
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {}
    versions: dict[str, str] = {}
    seconds: float
    finished_at: str

    @field_validator("finished_at")
    @classmethod
    def _is_a_time(cls, text: str) -> str:
        try:
            offset = datetime.fromisoformat(text).utcoffset()
        except ValueError:
            offset = None
        if offset is None:
            raise ValueError(f"{text!r} is no time with its offset, such as 2026-11-26T12:41:35+00:00")
        return text

    @property
    def finished(self) -> datetime:
        """When the stage was finished, with a time zone."""
        return datetime.fromisoformat(self.finished_at)

    @property
    def fingerprint(self) -> str:
        """Digest of content, settings and inputs; independent of code version and time."""
        files = {name: record.sha256 for name, record in self.files.items()}
        return digest({"stage": self.stage, "config": self.config, "inputs": self.inputs, "files": files})


def digest(value: Any) -> str:
    """SHA-256 of a JSON value with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file; a large one that did not change since this machine read it is not read again."""
    status = path.stat()
    return _file_digest(path.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=10_000)
def _file_digest(path: Path, size: int, changed: int) -> str:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            found = digests.recall(status)
            if found is None:
                found = hashlib.file_digest(file, "sha256").hexdigest()
                digests.remember(status, found)
            return found
    except OSError as error:
        raise StageError(_unreadable(path, error)) from error


def model_digest(file: Path) -> str | None:
    """SHA-256 of a file of a model without decode defaults; None if it holds nothing else."""
    if file.name != GENERATION:
        return file_digest(file)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise StageError(_unreadable(file, error)) from error
    model = without_defaults(content)
    return None if content != model == EMPTY else hashlib.sha256(model).hexdigest()


def matches(path: Path, record: FileRecord, hashed: bool = True, name: str | None = None) -> bool:
    """Whether a file has the recorded content; decode defaults in it do not count.

    Args:
        hashed: False compares sizes only.
        name: of the file, if it is in a temporary one.
    """
    if path.stat().st_size == record.bytes and (not hashed or file_digest(path) == record.sha256):
        return True
    if (name or path.name) != GENERATION:
        return False
    model = without_defaults(path.read_bytes())
    return len(model) == record.bytes and hashlib.sha256(model).hexdigest() == record.sha256


def fingerprint(path: str | Path, hashed: bool = True) -> str:
    """Fingerprint of a stage's folder (by its manifest, verified) or of a model folder (by its files).

    Args:
        hashed: False trusts the manifest for files of the right size; whoever reads the files verifies them.
    """
    folder = Path(path)
    if is_there(folder / MANIFEST):
        made, fitted = verify(folder, hashed=hashed), folder / COMMIT_RULE
        if COMMIT_RULE in made.files or not is_there(fitted):
            return made.fingerprint
        return digest([made.fingerprint, file_digest(fitted)])  # fitted after the stage was finished
    if is_there(folder / CLAIM):
        raise StageError(f"{folder} is unfinished (no {MANIFEST}): run its stage again to complete it")
    if not folder.is_dir():
        raise StageError(f"{folder}: no such folder (looked in {Path.cwd()})")
    files = sorted({file for pattern in WEIGHTS for file in folder.glob(pattern)})
    if not files:
        raise StageError(f"{folder} holds neither a {MANIFEST} nor a model (*.safetensors, config.json)")
    digests = {file.relative_to(folder).as_posix(): model_digest(file) for file in files}
    return digest({name: found for name, found in digests.items() if found is not None})


def read_manifest(folder: str | Path, stage: str | None = None) -> Manifest:
    """Read the manifest of a finished stage; StageError if it is missing or that of another stage."""
    path = Path(folder) / MANIFEST
    if not is_there(path):
        raise StageError(f"{folder}: no {MANIFEST}, so no finished stage; run the stage that makes it")
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise StageError(_unreadable(path, error)) from error
    except ValidationError as error:
        raise StageError(
            f"{path} is damaged ({explain(error)}): delete it and rerun; what is whole beside it is kept"
        ) from error
    if stage is not None and manifest.stage != stage:
        raise StageError(f"{folder} was made by stage {manifest.stage!r}, expected {stage!r}")
    return manifest


def _unreadable(path: Path, error: OSError) -> str:
    remedy = "move that folder aside" if error.errno == errno.EISDIR else "check its permissions and its disk"
    return f"{path} cannot be read ({error.strerror or error}): {remedy}"


def verify(folder: str | Path, stage: str | None = None, hashed: bool = True) -> Manifest:
    """Read the manifest and hash every file it lists; `StageError` names the first that differs.

    Args:
        hashed: False compares sizes only, which takes no time for models of any size.
    """
    manifest = read_manifest(folder, stage)
    for name, record in manifest.files.items():
        path = Path(folder) / name
        if not is_there(path):
            raise StageError(
                f"{path} is missing though {MANIFEST} lists it: delete {Path(folder) / MANIFEST} and rerun; "
                "what is whole is kept"
            )
        if not matches(path, record, hashed):
            raise StageError(
                f"{path} does not match {MANIFEST} (damaged or edited): delete it and "
                f"{Path(folder) / MANIFEST} and rerun; what is whole is kept"
            )
    return manifest


Settings = TypeVar("Settings", bound=Config)


def stage_key(config: Config, inputs: Mapping[str, str], code: str | None) -> str:
    """Key of a stage's result, ten hexadecimal digits; the name of its folder ends with it.

    Args:
        inputs: fingerprints of the inputs, by name.
        code: digest of the stage's code.
    """
    sections = [section for _, section in config if isinstance(section, ProblemsConfig)]
    data = [file_digest(file) for section in sections for file in section.files()]
    data += [split for section in sections for split in section.data_files]
    made_from = {"config": config.what(), "inputs": dict(inputs), "data": data, "code": code}
    return digest(made_from)[:10]


class Stage:
    """A stage's work in its folder: `done` if it is already finished, else `finish` writes the manifest."""

    def __init__(
        self,
        name: str,
        config: Config,
        inputs: Mapping[str, str | Path],
        out_dir: str | Path,
        origin: Origin | None = None,
    ):
        """Claim `out_dir` for this stage by writing `stage.json`.

        Args:
            origin: the run that the stage belongs to.

        Raises:
            CodeChangedError: the code is another one than when the run started.
            StageError: the folder belongs to other settings, inputs or code, or an input is missing or
                damaged.
        """
        self.name = name
        self.config, self.how = config.what(), config.how()
        self.inputs = {key: fingerprint(path) for key, path in inputs.items()}
        self.origin = origin or Origin()
        self.code = self.origin.accepted_code(name, config)
        self.folder = Path(out_dir)
        self.started = time.perf_counter()
        self.begun = datetime.now(UTC)  # when the first run of this stage began
        there = _claim_in(self.folder)
        if there is not None:
            with contextlib.suppress(KeyError, TypeError, ValueError):  # not recorded by earlier versions
                self.begun = datetime.fromisoformat(there["begun"])
            _refuse_to_mix(self.folder, there, self._claim)
            return
        if self.folder.is_dir() and any(not file.name.endswith(PARTIAL) for file in self.folder.iterdir()):
            if not self.folder.name.endswith(f"-{stage_key(config, self.inputs, self.code)}"):
                raise StageError(
                    f"{self.folder} is not empty and not a stage's folder ({CLAIM} is missing or damaged): "
                    "move it aside, or use another folder"
                )
            log.warning("%s was missing or damaged; it is written again", self.folder / CLAIM)
        claim = {**self._claim, "how": self.how, "begun": self.begun.isoformat(timespec="milliseconds")}
        write_atomically(self.folder / CLAIM, json.dumps(claim, indent=1))

    @property
    def _claim(self) -> dict[str, Any]:
        claim = {"stage": self.name, "config": self.config, "inputs": self.inputs}
        return claim if self.code is None else {**claim, "code": self.code}

    def as_begun(self, config: Settings, *names: str) -> Settings:
        """`config` with the settings `names` (marked `HOW`) replaced by those the folder was begun with."""
        begun = (_claim_in(self.folder) or {}).get("how", {})
        kept = {name: begun[name] for name in names if begun.get(name, self.how[name]) != self.how[name]}
        for name, value in kept.items():
            log.info("%s was begun with %s=%s, which is kept", self.folder, name, value)
            self.how[name] = value
        return config.model_copy(update=kept)

    @property
    def done(self) -> Manifest | None:
        """The verified manifest if this stage is finished, otherwise None."""
        return verify(self.folder, self.name) if is_there(self.folder / MANIFEST) else None

    def reopen(self) -> None:
        """Make a finished stage unfinished, so that its results can be written anew."""
        (self.folder / MANIFEST).unlink()

    def finish(
        self,
        files: Iterable[str],
        counts: dict[str, int] | None = None,
        metrics: dict[str, float] | None = None,
        details: dict[str, Any] | None = None,
    ) -> Manifest:
        """Hash `files` (relative paths) and write the manifest, which marks the stage as finished."""
        paths = {name: self.folder / name for name in sorted(files)}
        manifest = Manifest(
            stage=self.name,
            config=self.config,
            how=self.how,
            inputs=self.inputs,
            code=self.code,
            origin=self.origin.recorded(),
            files={
                name: FileRecord(bytes=path.stat().st_size, sha256=file_digest(path))
                for name, path in paths.items()
            },
            counts=counts or {},
            metrics=metrics or {},
            details=details or {},
            versions=versions(),
            seconds=time.perf_counter() - self.started,
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        write_atomically(self.folder / MANIFEST, manifest.model_dump_json(indent=1))
        return manifest


def claimed_code(folder: Path) -> str | None:
    """Digest of the code that began a stage's folder; None if it is not recorded."""
    try:
        code = (_claim_in(folder) or {}).get("code")
    except UserError:
        return None
    return code if isinstance(code, str) else None


def _claim_in(folder: Path) -> dict[str, Any] | None:
    """Content of a folder's `stage.json`; None if it is missing or damaged."""
    path = folder / CLAIM
    if not is_there(path):
        return None
    try:
        claim = json.loads(path.read_bytes())
    except OSError as error:
        raise StageError(_unreadable(path, error)) from error
    except ValueError:
        return None
    return claim if isinstance(claim, dict) else None


def _refuse_to_mix(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    there = {key: value for key, value in there.items() if key not in ("how", "begun")}
    if there == here:
        return
    old, new = dict(_flat(there)), dict(_flat(here))
    changed = [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} now"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
    raise StageError(
        f"{folder} was begun with other settings, inputs or code ({'; '.join(changed[:5])}): move it aside, "
        "or use another folder"
    )


def _flat(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}{key}.")
    else:
        yield prefix.rstrip("."), value
