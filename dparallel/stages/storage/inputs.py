"""Inputs of an experiment in a store: models and files of problems of one machine, for workers on others.

    <store>/.inputs/<digest>/…             the files
    <store>/.inputs/<digest>/listing.json  their digests, written last

On a machine, they are in a folder of the same name in `runs`.
"""

import logging
import os
from collections.abc import Iterator
from glob import has_magic
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from dparallel.config.base import ConfigError
from dparallel.config.experiment import DistillConfig
from dparallel.config.files import make_config, with_inputs
from dparallel.config.paths import is_url
from dparallel.config.sources import SourceConfig
from dparallel.stages.manifest import MANIFEST, WEIGHTS, FileRecord, digest, file_digest
from dparallel.stages.storage.folders import Storage, open_storage
from dparallel.stages.storage.remote import Remote, StorageError

log = logging.getLogger(__name__)

INPUTS, LISTING = ".inputs", "listing.json"  # experiments cannot have this name
MODEL_FILES = (*WEIGHTS, "*.py", "LICENSE*", "NOTICE*")
MODELS = ("teacher", "model", "adapter")  # settings that are models or adapters


class Listing(BaseModel):
    """The files of an input, by path."""

    files: dict[str, FileRecord]


def published(settings: dict[str, Any], storage: Storage) -> dict[str, Any]:
    """Settings whose local inputs are those of the store, after writing what is missing there.

    The folder of runs is left out: each machine has its own.
    """

    def publish(key: str, path: str) -> str:
        found = _files(key, path)
        if found is None:  # an id on the hub, a URL, or nothing, which is refused elsewhere
            return path
        base, files, rest = found
        listing = Listing(
            files={
                file.relative_to(base).as_posix(): FileRecord(
                    bytes=file.stat().st_size, sha256=file_digest(file)
                )
                for file in files
            }
        )
        name = f"{INPUTS}/{digest({file: record.sha256 for file, record in listing.files.items()})[:16]}"
        if storage.remote.read(f"{name}/{LISTING}") is None:
            log.info("%s is written to the store, for workers on other machines", path)
            storage.push_from(base, listing.files, name)
            storage.remote.create(f"{name}/{LISTING}", listing.model_dump_json(indent=1).encode())
        return f"{storage.remote.url}/{name}/{rest}"

    return {key: value for key, value in with_inputs(settings, publish).items() if key != "runs"}


def localized(config: DistillConfig) -> DistillConfig:
    """Settings whose inputs are on this machine, after reading those that are in a store.

    Raises:
        StorageError: the store cannot be used; or an input is missing or damaged there, or does not fit on
            the disk.
    """
    if config.store is not None:
        Remote(config.store).check()
    moved = False

    def localize(key: str, path: str) -> str:
        nonlocal moved
        shared = None if config.store is None else f"{Remote(config.store).url}/{INPUTS}/"
        if shared is not None and path.startswith(shared):
            moved = True
            name, _, rest = path.removeprefix(shared).partition("/")
            return str(_pulled(open_storage(str(config.store), config.runs), name) / rest)
        if is_url(path):
            moved = True
            return str(_pulled_from(path, config.runs))
        return path

    settings = with_inputs(config.model_dump(mode="json", exclude_unset=True), localize)
    return make_config(DistillConfig, settings, config.name) if moved else config


def _pulled(storage: Storage, name: str) -> Path:
    """The local folder of an input of the store of this experiment."""
    folder = storage.runs / INPUTS / name
    text = storage.remote.read(f"{INPUTS}/{name}/{LISTING}")
    if text is None:
        raise StorageError(
            f"{storage.remote.url}/{INPUTS}/{name} is not there: start the run again, which writes it anew"
        )
    storage.pull_files(folder, _parsed(storage.remote.url_of(f"{INPUTS}/{name}/{LISTING}"), text).files)
    return folder


def _pulled_from(url: str, runs: str) -> Path:
    """The local folder of a model, or the local file, at any URL.

    A finished stage is compared with its manifest; of other files only the sizes are known.
    """
    above, _, last = url.rpartition("/")
    remote = Remote(url)
    sizes = remote.sizes("")
    if MANIFEST in sizes:
        storage = Storage(above, Path(runs) / INPUTS / digest(above)[:16])
        storage.pull(storage.runs / last)
        return storage.runs / last
    names = [name for name in sizes if any(_matches(name, pattern) for pattern in MODEL_FILES)]
    if not names:
        raise ConfigError(
            f"{url} holds no model (*.safetensors, config.json): give the URL of a model's folder, such as "
            "that of a merging stage in a store"
        )
    folder = Path(runs) / INPUTS / digest({url: sizes})[:16] / last
    storage = Storage(url, folder)
    storage.pull_sizes(folder, {name: sizes[name] for name in names})
    return folder


def _parsed(url: str, text: bytes) -> Listing:
    try:
        return Listing.model_validate_json(text)
    except ValidationError as error:
        raise StorageError(f"{url} is damaged: delete it, and start the run again") from error


def _files(key: str, path: str) -> tuple[Path, list[Path], str] | None:
    """The folder that holds an input of this machine, its files, and its path in that folder."""
    if is_url(path):
        return None
    here = Path(os.path.abspath(path))
    if key in MODELS:
        files = sorted(_model_files(here)) if here.is_dir() else []
    else:
        files = [Path(os.path.abspath(file)) for file in SourceConfig(path=path).files()]
    if not files:
        return None
    base = here.parent
    while has_magic(str(base)):
        base = base.parent
    return base, files, here.relative_to(base).as_posix()


def _matches(name: str, pattern: str) -> bool:
    return Path(name).match(pattern) and name.count("/") == pattern.count("/")


def _model_files(folder: Path) -> Iterator[Path]:
    found = {file for pattern in MODEL_FILES for file in folder.glob(pattern)}
    return (file for file in found if file.is_file() and not file.name.startswith("."))
