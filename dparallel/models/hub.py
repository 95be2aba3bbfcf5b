"""Locate checkpoints: local folders, or models on the Hugging Face Hub with a local cache."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dparallel.config.base import nearest
from dparallel.config.paths import is_url, looks_local, shipped, store_protocol
from dparallel.models.formats import CheckpointError
from dparallel.models.offline import REMEDY, cache_if_offline

WEIGHTS = "*.safetensors"
COPY = {"s3": "aws s3 cp --recursive", "gs": "gcloud storage cp --recursive"}
MLFLOW = ("models:/", "runs:/", "mlflow-artifacts:/")
# Further files that are used or passed on: config, index, tokenizer, model code, licence. `*` spans folders.
SMALL = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py", "LICENSE*", "NOTICE*")


def checkpoint_folder(path: str | Path, with_weights: bool = True) -> Path:
    """Local folder of a checkpoint; a model on the Hub is downloaded if it is not cached.

    Args:
        path: a folder, `teachers/NAME` for one that comes with the package, or a Hub id: `owner/name`, or
            `owner/name@revision` with a branch, tag or commit.
        with_weights: False if config and tokenizer are sufficient; weights are then not downloaded.

    Raises:
        CheckpointError: neither a folder nor a Hub id, or the download fails or does not fit on the disk.
    """
    if not isinstance(path, str | Path):
        raise CheckpointError(f"the path of a model is {path!r}: give a folder or a Hub id as text")
    if str(path).startswith(MLFLOW):
        raise CheckpointError(
            f"{path} is a model of MLflow: download its files with `mlflow artifacts download --artifact-uri "
            f"{path} --dst-path FOLDER` and give that folder, or load it with mlflow.pyfunc.load_model"
        )
    if is_url(str(path)):
        url = str(path).rpartition("@")[2] if "@" in str(path) else path
        raise CheckpointError(
            f"{url} is in a store, and models are read from folders of this machine: copy it, such as by "
            f"`{COPY.get(store_protocol(str(path)), 'cp -r')} {url} FOLDER`, and give that folder"
        )
    here = Path(path).expanduser() if str(path).startswith("~/") else Path(path)
    try:
        if here.is_dir():
            if not os.access(here, os.R_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(here))
            return here
        if here.exists():
            raise CheckpointError(f"{path} is a file: give the folder that holds the model")
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}): check the path and its permissions"
        ) from error
    if str(path).startswith("teachers/") and (known := shipped(path)).is_dir():
        return known
    if looks_local(str(path)):
        raise CheckpointError(f"{path}: no such folder (looked in {Path.cwd()}){_similar(here)}")
    name, _, revision = str(path).partition("@")
    wanted = [*SMALL, WEIGHTS] if with_weights else [*SMALL]
    try:
        with cache_if_offline() as offline:
            if with_weights:
                _check_room(name, revision or None, wanted)
            return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    except IncompleteSnapshotError as error:
        raise CheckpointError(f"{path} is only partly in the local cache: {_first_line(error)}") from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"{path} is gated: accept its terms on the hub, and log in with `hf auth login` "
            f"({_first_line(error)})"
        ) from error
    except (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    ) as error:
        if offline and isinstance(error, LocalEntryNotFoundError):
            raise CheckpointError(
                f"{path} is neither a folder here ({Path.cwd()}) nor a model on the hub that the cache "
                f"{constants.HF_HUB_CACHE} holds, and {REMEDY}: give a local folder{_similar(here)}"
            ) from error
        raise CheckpointError(
            f"{path} is neither a folder here ({Path.cwd()}) nor a model on the hub ({_first_line(error)})"
            f"{_similar(here)}"
        ) from error
    except (OSError, HTTPError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room there or set HF_HOME to a larger disk" if full else "try again"
        raise CheckpointError(
            f"{path} could not be downloaded to {constants.HF_HUB_CACHE} ({_first_line(error)}): {remedy}"
        ) from error


def _similar(path: Path) -> str:
    """A "did you mean" hint with a folder beside `path`, as the end of a message."""
    known: dict[str, str] = {}
    teachers = shipped("teachers/any").parent
    for parent, shown in ((teachers, "teachers/{}"), (path.parent, f"{path.parent}/{{}}")):
        with contextlib.suppress(OSError):
            if parent == path.parent or len(path.parts) == 1 or str(path).startswith("teachers/"):
                known |= {each.name: shown.format(each.name) for each in os.scandir(parent) if each.is_dir()}
    hint = nearest(path.name, known).strip()
    return f"; {hint}" if hint else ""


def _check_room(name: str, revision: str | None, wanted: list[str]) -> None:
    try:
        files = snapshot_download(name, revision=revision, allow_patterns=wanted, dry_run=True)
    except DryRunError:
        return  # the Hub cannot be reached, so nothing will be downloaded
    needed = sum(file.file_size or 0 for file in files if file.will_download)
    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if needed > free:
        raise CheckpointError(
            f"{name} needs {needed / 1e9:.3g} GB more on the disk of {cache}, which has {free / 1e9:.3g} GB "
            "free: make room there or set HF_HOME to a larger disk"
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
