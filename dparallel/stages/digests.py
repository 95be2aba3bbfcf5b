"""Digests of large files that this machine has computed before, so that each file is read once.

A digest is remembered for a file's device, inode, size and modification time; a changed file differs in one
of them. The record is a file of the user's cache folder, `DPARALLEL_CACHE` or `~/.cache/dparallel`.
"""

import contextlib
import os
from pathlib import Path

LARGE = 1 << 20  # bytes; smaller files are read again
LONGEST = 8 << 20  # bytes of the record, which is then begun anew

_known: dict[str, str] = {}
_read_to = 0  # bytes of the record that are in `_known`


def cache_folder() -> Path:
    """The folder for what this machine keeps about files."""
    chosen = os.environ.get("DPARALLEL_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(chosen) if chosen else Path(base, "dparallel")


def recall(status: os.stat_result) -> str | None:
    """The SHA-256 of a large file, by its status; None if it is not known."""
    if status.st_size < LARGE:
        return None
    _read()
    return _known.get(_key(status))


def remember(status: os.stat_result, digest: str) -> None:
    """Record the SHA-256 of a large file; without a writable cache folder, only for this process."""
    if status.st_size < LARGE:
        return
    _known[_key(status)] = digest
    with contextlib.suppress(OSError):
        record = _record()
        record.parent.mkdir(parents=True, exist_ok=True)
        if record.exists() and record.stat().st_size > LONGEST:
            record.unlink()
        with record.open("a", encoding="utf-8") as lines:
            lines.write(f"{_key(status)} {digest}\n")


def _record() -> Path:
    return cache_folder() / "digests"


def _read() -> None:
    """Read what this and other processes have recorded since the last call."""
    global _read_to
    with contextlib.suppress(OSError, UnicodeDecodeError):
        record = _record()
        size = record.stat().st_size
        if size == _read_to:
            return
        with record.open(encoding="utf-8") as lines:
            lines.seek(_read_to if size > _read_to else 0)
            for line in lines:
                key, _, digest = line.rstrip("\n").partition(" ")
                if line.endswith("\n") and len(digest) == 64:
                    _known[key] = digest
        _read_to = size


def _key(status: os.stat_result) -> str:
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
