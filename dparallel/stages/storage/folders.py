"""Stages' folders in a store: what is finished is pulled and pushed whole, with its manifest last.

The store mirrors a folder of runs: `<store>/<experiment>/<stage>-<key>/…`. An object of a stage is trusted
once there is a manifest that lists it, which is written by a request that fails where one exists.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from dparallel.config.base import explain
from dparallel.stages.files import is_there, new_partial, remove_partial, write_atomically
from dparallel.stages.generation_file import GENERATION
from dparallel.stages.manifest import (
    CLAIM,
    MANIFEST,
    FileRecord,
    Manifest,
    file_digest,
    matches,
    read_manifest,
)
from dparallel.stages.metrics_log import METRICS
from dparallel.stages.storage.remote import Remote, StorageError

log = logging.getLogger(__name__)

TOGETHER = 8  # files transferred at the same time
CHECKPOINTS, DESCRIPTION = "checkpoints", "checkpoint.json"  # of a training; the description is written last
# Files of a stage that its manifest does not list, or whose decode defaults it does not record.
BESIDE = (CLAIM, METRICS, GENERATION)
SHARD = "part-*.parquet"
FIXED = (CLAIM, SHARD)  # files of an unfinished stage that never change

Item = TypeVar("Item")


class Storage:
    """A store, and the folder of runs of this machine that it mirrors."""

    def __init__(self, url: str, runs: str | Path):
        self.remote = Remote(url)
        self.runs = Path(os.path.abspath(runs))
        self._manifests: dict[str, Manifest] = {}  # which do not change
        self._brought: set[Path] = set()
        self._pushed: dict[Path, tuple[int, int]] = {}  # sizes and times of files that are in the store

    def name(self, path: str | Path) -> str:
        """Name in the store of a file or folder of runs."""
        return Path(os.path.abspath(path)).relative_to(self.runs).as_posix()

    def holds(self, path: str | Path) -> bool:
        """Whether a path lies in the folder of runs, which the store mirrors."""
        return Path(os.path.abspath(path)).is_relative_to(self.runs)

    # Finished stages

    def manifest(self, folder: str | Path) -> Manifest | None:
        """The manifest of a stage in the store; None if it is not finished there.

        Raises:
            StorageError: it is damaged.
        """
        name = f"{self.name(folder)}/{MANIFEST}"
        if name not in self._manifests and (data := self.remote.read(name)) is not None:
            self._manifests[name] = self._parsed(name, data)
        return self._manifests.get(name)

    def pull(self, folder: str | Path) -> Manifest | None:
        """Make the folder of a stage that is finished in the store whole; None if it is not finished there.

        Files that are here with the right content are kept; the manifest is written last.

        Raises:
            StorageError: a file of the store is missing or damaged; or the stage is finished here, too, with
                another content.
        """
        folder, there = Path(folder), self.manifest(folder)
        if there is None:
            return None
        if is_there(folder / MANIFEST):
            here = read_manifest(folder)
            if here.fingerprint != there.fingerprint:
                raise self._differs(folder)
        name = self.name(folder)
        self.pull_files(folder, there.files)
        for beside in BESIDE:
            if not is_there(folder / beside):
                self._pull_file(f"{name}/{beside}", folder / beside)
        write_atomically(folder / MANIFEST, self.remote.read(f"{name}/{MANIFEST}") or b"")
        return there

    def push(self, folder: str | Path, replaces: Manifest | None = None) -> None:
        """Write a finished stage to the store, its manifest last. What is there already is not sent again.

        Args:
            replaces: the manifest that was there when the stage was opened again, which this one replaces.

        Raises:
            StorageError: the stage is finished there with another content.
        """
        folder, name = Path(folder), self.name(folder)
        manifest, there = read_manifest(folder), self._read_manifest(f"{name}/{MANIFEST}")
        if there is not None and there.fingerprint == manifest.fingerprint:
            return
        if there is not None:
            if replaces is None or replaces.fingerprint != there.fingerprint:
                raise self._differs(folder)
            self.remote.remove([f"{name}/{MANIFEST}"])
            self._manifests.pop(f"{name}/{MANIFEST}", None)
        present = self.remote.sizes(name)
        beside = [file for file in BESIDE if is_there(folder / file)]
        self.push_files(folder, dict.fromkeys([*manifest.files, *beside]), present)
        data = (folder / MANIFEST).read_bytes()
        if not self.remote.create(f"{name}/{MANIFEST}", data):
            there = self._read_manifest(f"{name}/{MANIFEST}")
            if there is None or there.fingerprint != manifest.fingerprint:
                raise self._differs(folder)
        log.info("%s is in the store: %s", folder.name, self.remote.url_of(name))
        self.remote.remove(f"{name}/{file}" for file in _checkpoint_files(present))

    # Unfinished stages

    def push_unfinished(self, folder: str | Path) -> None:
        """Write to the store what another run can go on from: whole shards and checkpoints, and the log.

        Checkpoints that are no longer here are removed there. A checkpoint counts with its description, which
        is written last; by then the log reaches at least as far.
        """
        folder, name = Path(folder), self.name(folder)
        checkpoints = {tag.name for tag in _whole_checkpoints(folder)}
        for pattern in FIXED:
            for file in filter(self._is_changed, folder.glob(pattern)):
                self.share(file)
        states = {
            file.relative_to(folder)
            for tag in checkpoints
            for file in (folder / CHECKPOINTS / tag).iterdir()
            if file.is_file()
        }
        descriptions = {file for file in states if file.name == DESCRIPTION}
        present: dict[str, int] | None = None
        for group in ({Path(METRICS)}, states - descriptions, descriptions):
            changed = [file for file in sorted(group) if self._is_changed(folder / file)]
            if changed and present is None:
                present = self.remote.sizes(name)
            self.push_files(folder, [file.as_posix() for file in changed], present or {})
        if present is not None and checkpoints:
            gone = [file for file in _checkpoint_files(present) if file.split("/")[1] not in checkpoints]
            self.remote.remove(f"{name}/{file}" for file in sorted(gone, key=_is_state))

    def pull_unfinished(self, folder: str | Path) -> None:
        """Bring what other runs of an unfinished stage made: shards, and checkpoints if they are later."""
        folder, name = Path(folder), self.name(folder)
        present = self.remote.sizes(name)
        wanted = [file for file in present if file == CLAIM or Path(file).match(SHARD)]
        here = max((tag.name for tag in _whole_checkpoints(folder)), default="")
        whole = sorted(
            {file.split("/")[1] for file in _checkpoint_files(present) if file.endswith(f"/{DESCRIPTION}")}
        )
        later = [tag for tag in whole if tag > here]
        states = [file for file in _checkpoint_files(present) if file.split("/")[1] in later]
        wanted += sorted(states, key=_is_state, reverse=True)
        missing = [file for file in wanted if not is_there(folder / file)]
        if later and METRICS in present:
            missing.append(METRICS)
        if not missing:
            return
        self._check_room(folder, sum(present[file] for file in missing))
        for group in (
            [file for file in missing if not file.endswith(f"/{DESCRIPTION}")],
            [file for file in missing if file.endswith(f"/{DESCRIPTION}")],
        ):
            _together(group, lambda file: self._pull_file(f"{name}/{file}", folder / file))
        log.info("%s: %d files of other runs from the store", folder.name, len(missing))

    # Measurements, which all experiments share

    def bring(self, path: Path) -> None:
        """Bring a file, or the files of a folder, that other machines made; for the first time only."""
        if path not in self._brought:
            self._brought.add(path)
            self._bring(path)

    def bring_again(self) -> None:
        """Bring what other machines have made of all paths that were brought."""
        _together(list(self._brought), self._bring)

    def share(self, file: Path) -> None:
        """Write a file that was made here to the store; if there is one already, take that one instead."""
        name, status = self.name(file), file.stat()
        if not self.remote.create(name, file.read_bytes()):
            there = self.remote.digest(name)
            if there != file_digest(file):
                self._pull_file(name, file)
                status = file.stat()
        self._pushed[file] = (status.st_size, status.st_mtime_ns)

    def _bring(self, path: Path) -> None:
        name = self.name(path)
        if path.suffix:
            if not is_there(path):
                self._pull_file(name, path)
            return
        missing = [file for file in self.remote.sizes(name) if not is_there(path / file)]
        _together(missing, lambda file: self._pull_file(f"{name}/{file}", path / file))

    # Files

    def pull_files(self, folder: Path, records: Mapping[str, FileRecord]) -> None:
        """Download files into a folder, except those that are here, and compare their digests.

        Raises:
            StorageError: a file is missing or damaged there, or does not fit on the disk.
        """
        for file in records:
            if not Path(os.path.abspath(folder / file)).is_relative_to(os.path.abspath(folder)):
                raise StorageError(f"{self.remote.url_of(self.name(folder))} lists {file!r}, outside of it")
        missing = {
            file: record
            for file, record in records.items()
            if not is_there(folder / file) or not matches(folder / file, record)
        }
        if not missing:
            return
        self._check_room(folder, sum(record.bytes for record in missing.values()))
        name = self.name(folder)

        def fetch(file: str) -> None:
            if not self._pull_file(f"{name}/{file}", folder / file, missing[file]):
                raise StorageError(
                    f"{self.remote.url_of(name)}/{file} is missing though it is listed: delete "
                    f"{self.remote.url_of(name)} and run its stage again"
                )

        _together(missing, fetch)

    def pull_sizes(self, folder: Path, sizes: Mapping[str, int]) -> None:
        """Download files of known sizes and unknown content, except those that are here."""
        missing = [
            file
            for file, size in sizes.items()
            if not is_there(folder / file) or (folder / file).stat().st_size != size
        ]
        if missing:
            self._check_room(folder, sum(sizes[file] for file in missing))
            name = self.name(folder)
            at = f"{name}/" if name != "." else ""
            _together(missing, lambda file: self._pull_file(f"{at}{file}", folder / file))

    def push_files(self, folder: Path, files: Iterable[str], present: Mapping[str, int]) -> None:
        """Upload files of a folder of runs, except those whose content is there.

        Args:
            present: sizes of the objects of the folder, by name.
        """
        self._push(folder, files, self.name(folder), present)

    def push_from(self, folder: Path, files: Iterable[str], name: str) -> None:
        """Upload files of any folder as objects below `name`, except those whose content is there."""
        self._push(folder, files, name, self.remote.sizes(name))

    def _push(self, folder: Path, files: Iterable[str], name: str, present: Mapping[str, int]) -> None:

        def send(file: str) -> None:
            path = folder / file
            with contextlib.suppress(FileNotFoundError):  # an old checkpoint that was removed meanwhile
                before, digest = path.stat(), file_digest(path)
                there = f"{name}/{file}"
                if present.get(file) != before.st_size or self.remote.digest(there) != digest:
                    self.remote.upload(path, there, digest)
                self._pushed[path] = (before.st_size, before.st_mtime_ns)

        _together(files, send)

    def _is_changed(self, path: Path) -> bool:
        try:
            status = path.stat()
        except FileNotFoundError:
            return False
        return self._pushed.get(path) != (status.st_size, status.st_mtime_ns)

    def _pull_file(self, name: str, path: Path, record: FileRecord | None = None) -> bool:
        """Download an object to a file, atomically; False if there is none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        file, partial = new_partial(path)
        try:
            with file:
                if not self.remote.download(name, partial):
                    return False
                if record is not None and not matches(partial, record, name=path.name):
                    raise StorageError(
                        f"{self.remote.url_of(name)} does not match its manifest (damaged or edited): delete "
                        "it and its manifest.json there, and run its stage again where the folder is whole"
                    )
                os.replace(partial, path)
        finally:
            remove_partial(partial)
        return True

    def _check_room(self, folder: Path, needed: int) -> None:
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        if needed > free:
            raise StorageError(
                f"{folder} needs {needed / 1e9:.3g} GB from {self.remote.url}, and {free / 1e9:.3g} GB are "
                "free on its disk: make room there, or set runs to a folder on a larger disk"
            )

    def _read_manifest(self, name: str) -> Manifest | None:
        data = self.remote.read(name)
        return None if data is None else self._parsed(name, data)

    def _parsed(self, name: str, data: bytes) -> Manifest:
        try:
            return Manifest.model_validate_json(data)
        except ValidationError as error:
            raise StorageError(
                f"{self.remote.url_of(name)} is damaged ({explain(error)}): delete it and run its stage again"
            ) from error

    def _differs(self, folder: Path) -> StorageError:
        there = self.remote.url_of(self.name(folder))
        return StorageError(
            f"{there} is finished with another content than {folder}: move {folder} aside to take that of "
            f"the store, or delete {there} to take that of this machine, and run the same again"
        )


def _whole_checkpoints(folder: Path) -> list[Path]:
    return sorted(file.parent for file in (folder / CHECKPOINTS).glob(f"step-*/{DESCRIPTION}"))


def _checkpoint_files(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(f"{CHECKPOINTS}/step-") and name.count("/") > 1]


def _is_state(name: str) -> bool:
    """Whether a checkpoint's file is not its description, which is written last and removed first."""
    return not name.endswith(f"/{DESCRIPTION}")


def _together(items: Iterable[Item], act: Callable[[Item], object]) -> None:
    """Call `act` for all items, several at a time; the first error is raised when all have ended."""
    with ThreadPoolExecutor(TOGETHER) as pool:
        for done in list(pool.map(lambda item: _outcome(act, item), items)):
            if done is not None:
                raise done


def _outcome(act: Callable[[Item], object], item: Item) -> Exception | None:
    try:
        act(item)
    except Exception as error:
        return error
    return None


def open_storage(url: str, runs: str) -> Storage:
    """The store of a URL for a folder of runs; one for the whole process, which remembers manifests."""
    return _storage(url, os.path.abspath(runs))


@cache
def _storage(url: str, runs: str) -> Storage:
    return Storage(url, runs)
