"""Objects of a store, by name: read, write, create if absent, upload, download, list, remove.

A store is a folder, or a prefix in a bucket of S3 or Google Cloud Storage, reached through fsspec.
Credentials and endpoints come from the environment or from fsspec's own config files.
"""

import contextlib
import hashlib
import importlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import fsspec
from fsspec.callbacks import Callback

from dparallel.config.base import UserError
from dparallel.config.paths import STORES, store_protocol
from dparallel.stages.files import create, replacing, write_atomically

log = logging.getLogger(__name__)

EXTRAS = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs")}  # module and extra of a protocol
CREDENTIALS = {
    "s3": "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL and the rights of this account",
    "gs": "check GOOGLE_APPLICATION_CREDENTIALS and the rights of this account",
}
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before another try, after those of fsspec's file systems
LIBRARIES = ("aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "s3fs", "urllib3")  # raise own errors
FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
UNREACHABLE = ("ClientConnectorError", "ConnectTimeoutError", "EndpointConnectionError", "gaierror")
NEVER = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError")
DIGEST = "sha256"  # key of the digest in an object's metadata
LARGE, SAID_EVERY = 100e6, 20.0  # bytes of a file whose progress is logged, and seconds between two lines

Result = TypeVar("Result")


class StorageError(UserError):
    """A store cannot be reached, read or written, or holds something else; the message names the remedy."""


class Remote:
    """The objects below a URL. Names are relative to it, with `/` between their parts."""

    def __init__(self, url: str):
        """Nothing is contacted yet.

        Raises:
            StorageError: the URL's kind is unknown, or its library is not installed.
        """
        self.url = url.rstrip("/")
        self.protocol = store_protocol(url)
        if self.protocol not in (*STORES, "memory"):  # which is that of this process
            raise StorageError(f"{url}: no store of this kind is known; valid: a folder, {', '.join(STORES)}")

    @cached_property
    def _at(self) -> tuple[Any, str]:
        """The file system, without cached listings, and the path of the URL in it."""
        if self.protocol in EXTRAS:
            module, extra = EXTRAS[self.protocol]
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise StorageError(
                    f"{self.url} needs {module}, which is not installed: pip install 'dparallel[{extra}]'"
                ) from error
        url = self.url if self.protocol != "file" else os.path.abspath(self.url.removeprefix("file://"))
        if self.protocol == "file":
            return fsspec.filesystem("file"), url
        system, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        return system, root.rstrip("/")

    @property
    def local(self) -> Path | None:
        """The store as a folder of this machine; None if it is none."""
        return Path(self._at[1]) if self.protocol == "file" else None

    def url_of(self, name: str) -> str:
        """The URL of an object, for messages."""
        return f"{self.url}/{name}"

    def check(self) -> None:
        """Write, read and remove a small object.

        Raises:
            StorageError: the store cannot be reached, does not exist or cannot be written.
        """
        name, text = f".probe-{uuid4().hex}", b"dparallel"
        with self._naming("", "cannot be used"):
            if self.local is not None:
                self.local.mkdir(parents=True, exist_ok=True)
            if not self._create(name, text) or self._read(name) != text:
                raise StorageError(f"{self.url}: what is written there is not read again: use another store")
            self._remove(name)

    def read(self, name: str) -> bytes | None:
        """The content of an object; None if there is none."""
        return self._tried(name, "cannot be read", lambda: self._read(name))

    def write(self, name: str, data: bytes) -> None:
        """Write an object, replacing what has its name."""
        self._tried(name, "cannot be written", lambda: self._write(name, data))

    def create(self, name: str, data: bytes) -> bool:
        """Write an object whole if there is none of its name; False if there is one.

        Exactly one of several concurrent writers succeeds. False may also mean that one's own object is there
        and the answer was lost: compare what is there.
        """
        return self._tried(name, "cannot be written", lambda: self._create(name, data))

    def upload(self, file: Path, name: str, digest: str) -> None:
        """Write a file's content as an object, with its SHA-256 where the store keeps metadata."""
        self._tried(name, "cannot be written", lambda: self._upload(file, name, digest))

    def download(self, name: str, file: Path) -> bool:
        """Write an object's content to a file; False if there is no such object."""
        return self._tried(name, "cannot be read", lambda: self._download(name, file))

    def sizes(self, prefix: str) -> dict[str, int]:
        """Bytes of all objects below `prefix/`, by name relative to it."""
        system, root = self._at
        at = f"{root}/{prefix}"

        def find() -> dict[str, int]:
            found = system.find(at, detail=True)
            return {path[len(at) :].lstrip("/"): entry["size"] for path, entry in found.items()}

        def is_whole(name: str) -> bool:
            return name != "" and not name.rpartition("/")[2].startswith(".")

        found = self._tried(prefix, "cannot be listed", find)
        return {name: size for name, size in found.items() if is_whole(name)}

    def digest(self, name: str) -> str:
        """SHA-256 of an object, from its metadata if recorded there, otherwise of its content."""
        system, root = self._at

        def of_content() -> str:
            with system.open(f"{root}/{name}", mode="rb") as content:
                return hashlib.file_digest(content, "sha256").hexdigest()

        def recorded() -> str:
            known = None
            if self.protocol in EXTRAS:
                with contextlib.suppress(KeyError):  # gcsfs; s3fs returns None
                    known = system.getxattr(f"{root}/{name}", DIGEST)
            return str(known) if known else of_content()

        return self._tried(name, "cannot be read", recorded)

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects; missing ones are passed over."""
        for name in names:
            self._tried(name, "cannot be removed", partial(self._remove, name))

    # Single tries

    def _read(self, name: str) -> bytes | None:
        system, root = self._at
        try:
            data: bytes = system.cat_file(f"{root}/{name}")
        except FileNotFoundError:
            return None
        return data

    def _write(self, name: str, data: bytes) -> None:
        system, root = self._at
        if self.local is not None:
            write_atomically(self.local / name, data)
        else:
            system.pipe_file(f"{root}/{name}", data)

    def _create(self, name: str, data: bytes) -> bool:
        system, root = self._at
        if self.local is not None:
            (self.local / name).parent.mkdir(parents=True, exist_ok=True)
            return create(self.local / name, data)
        try:
            system.pipe_file(f"{root}/{name}", data, mode="create")
        except FileExistsError:
            return False
        return True

    def _upload(self, file: Path, name: str, digest: str) -> None:
        system, root = self._at
        if self.local is not None:
            with file.open("rb") as content, replacing(self.local / name) as copy:
                shutil.copyfileobj(content, copy, 1 << 24)
            return
        metadata: dict[str, Any] = {
            "s3": {"Metadata": {DIGEST: digest}},
            "gs": {"metadata": {DIGEST: digest}},
        }.get(self.protocol, {})
        told = _Told(f"pushing {self.url_of(name)}")
        system.put_file(str(file), f"{root}/{name}", callback=told, **metadata)

    def _download(self, name: str, file: Path) -> bool:
        system, root = self._at
        try:
            system.get_file(f"{root}/{name}", str(file), callback=_Told(f"pulling {self.url_of(name)}"))
        except FileNotFoundError:
            return False
        return True

    def _remove(self, name: str) -> None:
        system, root = self._at
        with contextlib.suppress(FileNotFoundError):
            system.rm_file(f"{root}/{name}")

    def _tried(self, name: str, failed: str, act: Callable[[], Result]) -> Result:
        """Run `act`, again after errors that may pass."""
        for wait in WAITS:
            try:
                return act()
            except Exception as error:
                if self.protocol not in EXTRAS or not _may_succeed_later(error):
                    break
                log.warning("%s %s (%s): trying again", self.url_of(name), failed, _first_line(error))
                time.sleep(wait)
        with self._naming(name, failed):
            return act()

    @contextlib.contextmanager
    def _naming(self, name: str, failed: str) -> Iterator[None]:
        """Convert errors of the store into a StorageError of one line."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            endpoint = "endpoint" in str(error).lower()  # of a malformed one, often a ValueError
            known = isinstance(error, OSError) or (endpoint and isinstance(error, ValueError))
            if not (known or _is_of_library(error)):
                raise
            remedy = CREDENTIALS.get(self.protocol, "check the folder, its permissions and its disk")
            if isinstance(error, FileNotFoundError) and self.protocol in EXTRAS:
                remedy = "create the bucket, or name another store"
            elif type(error).__name__ in UNREACHABLE:
                remedy = "check the network and the endpoint (AWS_ENDPOINT_URL, FSSPEC_* variables)"
            elif endpoint:
                remedy = "write the endpoint as http://HOST:PORT (AWS_ENDPOINT_URL, FSSPEC_* variables)"
            raise StorageError(
                f"{self.url_of(name) if name else self.url} {failed} ({_first_line(error)}): {remedy}"
            ) from error


class _Told(Callback):
    """Logs the progress of a large file."""

    def __init__(self, label: str):
        super().__init__()
        self.label, self.said_at = label, time.monotonic()

    def call(self, hook_name: str | None = None, **options: Any) -> None:
        if (self.size or 0) >= LARGE and time.monotonic() - self.said_at > SAID_EVERY:
            self.said_at = time.monotonic()
            log.info("%s: %.2f of %.2f GB", self.label, self.value / 1e9, (self.size or 0) / 1e9)


def _may_succeed_later(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, (UserError, *FINAL)) or type(error).__name__ in NEVER:
        return False
    return _is_of_library(error) or isinstance(error, OSError)


def _is_of_library(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] in LIBRARIES


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
