"""Write files atomically; every file of this package is written through this module.

Readers see either the old content or the complete new content. Symbolic links are followed, and an existing
file keeps its mode and owner. Devices, pipes and streams such as `/dev/stdout` are written to, not replaced.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from dparallel.config.base import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Phrases in messages of safetensors, and of torch, whose writer does not report the cause.
SAYS_NO_ROOM = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "PytorchStreamWriter failed writing",
    "inline_container.cc",
)
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES)  # no hard links supported
PARTIAL = ".partial"  # how the names of temporary files end
CLAIMED = ".claim"
SAVING = ".saving-"  # how those of temporary folders of models that are being saved begin
LONGEST_CHAIN = 40  # symbolic links followed, as in Linux
_partials = set[Path]()  # temporary files of this process


class FileError(UserError, OSError):
    """A file cannot be read or written; the message names the file, the reason and the remedy."""


def is_there(path: Path) -> bool:
    """Whether a file exists, before it is read or made.

    Raises:
        FileError: a folder, pipe or device has its name.
    """
    try:
        mode = path.stat().st_mode  # once: another process may be replacing the file
    except (FileNotFoundError, NotADirectoryError):
        return False
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise FileError(f"{path} is {kind}, expected a file: move it aside and run the same again")
    return True


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file is missing or damaged, or holds another value."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def write_atomically(path: str | Path, content: str | bytes, replace: bool = True) -> None:
    """Write a complete file; text is encoded as UTF-8.

    Args:
        replace: if False, an existing file is kept, also if another process creates it meanwhile.

    Raises:
        FileError: missing permission, full disk, or a folder that cannot be created. The old file is kept.
    """
    data = content.encode() if isinstance(content, str) else content
    with naming_the_file(path, len(data)), replacing(path, replace) as file:
        file.write(data)


def write_table(path: str | Path, table: pa.Table, replace: bool = True) -> None:
    """Write a Parquet file (zstd compression, page checksums).

    Args:
        replace: if False, an existing file is kept, also if another process creates it meanwhile.

    Raises:
        FileError: see `write_atomically`.
    """
    with naming_the_file(path, table.nbytes), replacing(path, replace) as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)


@contextlib.contextmanager
def replacing(path: str | Path, replace: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file that takes the place of `path` on success and is deleted after an error.

    If `path` is a device, pipe or stream, it is opened directly.
    """
    path = Path(path)
    if is_written_through(path):
        with _opened(path) as stream:
            yield stream
        return
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
    file, partial = new_partial(target)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if replace:
                _keep_mode_and_owner(partial, target)
                os.replace(partial, target)
            else:
                _link_unless_there(partial, target)
    finally:
        remove_partial(partial)


def create(path: Path, data: bytes) -> bool:
    """Create a file with its content in one operation; False if it exists.

    Raises:
        FileError: as `write_atomically`.
    """
    with naming_the_file(path):
        file, whole = new_partial(path)
    try:
        with file:
            with naming_the_file(path):
                file.write(data)
                file.flush()
            os.link(whole, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return _create_in_place(path, data)
    finally:
        remove_partial(whole)
    return True


def _create_in_place(path: Path, data: bytes) -> bool:
    try:
        with path.open("xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    return True


def new_partial(target: Path) -> tuple[BinaryIO, Path]:
    """A new temporary file beside `target`, locked while it is open, so that `sweep` keeps it."""
    while True:
        # A file system takes names of 255 bytes, and a character may be four of them.
        partial = target.with_name(f".{target.name[:40]}.{uuid4().hex}{PARTIAL}")
        _partials.add(partial)
        file = partial.open("xb")
        if _lock(file) and partial.exists():
            return file, partial
        file.close()  # a process that sweeps the folder was faster
        remove_partial(partial)


@contextlib.contextmanager
def saving_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder in `folder` for the files of a model, removed afterwards."""
    partial = folder / f"{SAVING}{uuid4().hex}"
    _partials.add(partial)
    try:
        partial.mkdir()
        yield partial
    finally:
        remove_partial(partial)


def remove_partial(partial: Path) -> None:
    """Remove a temporary file or folder that this process made."""
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        partial.unlink(missing_ok=True)
    _partials.discard(partial)


def remove_all_partials() -> None:
    """Remove what is temporary of this process, which is about to end without leaving its blocks."""
    for partial in list(_partials):
        with contextlib.suppress(OSError):
            remove_partial(partial)


@contextlib.contextmanager
def making(path: Path) -> Iterator[bool]:
    """Claim a file that several processes may make; yields False if another process is making it.

    The claim is a locked temporary file beside `path`, and ends with its process. Where the file system has
    no locks, every process gets the claim.
    """
    claim = path.with_name(f".{path.name[:40]}{CLAIMED}{PARTIAL}")
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_unless_locked, claim)  # first, since Ctrl-C may come right after the opening
        while True:
            with naming_the_file(path):
                claim.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(claim.open("ab"))
            if not _lock(file):
                yield False
                return
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), claim.stat()):
                    break
            file.close()  # the process that had the claim has removed it meanwhile
        _partials.add(claim)
        stack.callback(remove_partial, claim)
        yield True


def sweep(folder: Path, alone: bool = False) -> None:
    """Remove the temporary files in a folder and below it whose writers were killed.

    Files that are still being written are locked, and kept; so are all where the file system has no locks.

    Args:
        alone: whether this process holds the folder's lease; then temporary folders of models that were
            being saved are removed as well.
    """
    if alone:
        for saving in folder.glob(f"{SAVING}*"):
            shutil.rmtree(saving, ignore_errors=True)
    for partial in folder.rglob(f".*{PARTIAL}"):
        _remove_unless_locked(partial)


def _remove_unless_locked(partial: Path) -> None:
    """Remove a temporary file that no process works on; where the file system has no locks, it is kept."""
    with contextlib.suppress(OSError), partial.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        partial.unlink(missing_ok=True)


def _lock(file: BinaryIO) -> bool:
    """Lock a file until it is closed; False if another process holds its lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks
        return True
    return True


@contextlib.contextmanager
def naming_the_file(path: str | Path, size: int | None = None) -> Iterator[None]:
    """Convert errors of writing into a `FileError`, one line that names `path`.

    Also for writers of other libraries, whose errors may be of any class and may not name the path.

    Args:
        size: number of bytes to write, if known.
    """
    try:
        yield
    except (FileError, BrokenPipeError):
        raise
    except OSError as error:
        raise FileError(_why(Path(path), error, size)) from error
    except Exception as error:
        if not any(text in str(error) for text in SAYS_NO_ROOM):
            raise
        raise FileError(_why(Path(path), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), size)) from error


def give_usual_modes(files: Iterable[Path]) -> None:
    """Give `files`, all under one folder, the default mode of new files according to the umask.

    Some libraries create files with mode 0600, which other accounts cannot read.
    """
    for file in files:
        probe = file.with_name(f".{uuid4().hex}.mode")
        probe.touch()
        file.chmod(stat.S_IMODE(probe.stat().st_mode))
        probe.unlink()


def _why(path: Path, error: OSError, size: int | None) -> str:
    reason = error.strerror or str(error)
    if error.errno == errno.EISDIR:
        return f"{path} cannot be written ({reason}): move that folder aside and run the same again"
    if error.errno not in NO_ROOM:
        return f"{path} cannot be written ({reason}): check its folder, its permissions and its disk"
    needed = "" if size is None else f"{size / 1e6:,.3g} MB to write, "
    return (
        f"{path} cannot be written ({reason}; {needed}{_free(path) / 1e6:,.3g} MB free on its disk): make "
        "room there and run the same again"
    )


def _free(path: Path) -> int:
    """Free bytes on the file system of `path`, which need not exist yet."""
    folder = next((parent for parent in path.absolute().parents if parent.is_dir()), Path("/"))
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).free
    return 0


def is_written_through(path: Path) -> bool:
    """Whether `path` is written to directly: not a regular file, or an open stream of a process."""
    try:
        mode = path.stat().st_mode
    except OSError:  # missing or impossible: a loop of links, a file in place of a folder
        return False
    return not stat.S_ISREG(mode) or _is_stream(path)


def _is_stream(path: Path) -> bool:
    """Whether a path resolves to `/proc/*/fd`, as `/dev/stdout` does; others may write there too."""
    hop = path.absolute()
    for _ in range(LONGEST_CHAIN):
        if os.path.realpath(hop.parent).startswith("/proc/"):
            return True
        if not hop.is_symlink():
            return False
        hop = hop.parent / os.readlink(hop)
    return False


def _opened(path: Path) -> BinaryIO:
    """Open for appending: a redirected stream may already contain text."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND), "wb")


def _keep_mode_and_owner(partial: Path, target: Path) -> None:
    try:
        there = target.stat()
    except FileNotFoundError:
        return
    made = partial.stat()
    if (made.st_uid, made.st_gid) != (there.st_uid, there.st_gid):
        with contextlib.suppress(
            PermissionError
        ):  # only root may change the owner, but the group may be ours
            os.chown(partial, -1, there.st_gid)
            os.chown(partial, there.st_uid, -1)
    partial.chmod(stat.S_IMODE(there.st_mode))


def _link_unless_there(partial: Path, target: Path) -> None:
    """Move the file into place if the name is free, so that the first of several writers wins."""
    try:
        os.link(partial, target)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if not target.exists():
            os.replace(partial, target)
