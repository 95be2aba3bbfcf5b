"""Check that `--out` and `--trace` can be written before any work starts."""

import os
from pathlib import Path
from tempfile import TemporaryFile

from dparallel.config.base import ConfigError
from dparallel.stages.files import is_written_through


def check_different(out: Path | None, trace: Path | None) -> None:
    """Raise a ConfigError if the page of `--trace` would replace the results of `--out`."""
    if out is None or trace is None or is_written_through(out):
        return
    if os.path.realpath(out) == os.path.realpath(trace):
        raise ConfigError(f"--out {out} and --trace {trace} are the same file; name two files")


def check_writable(flag: str, path: Path | None) -> None:
    """Raise an error if a path cannot be written to.

    Raises:
        ConfigError: names the flag, the path and the remedy.
    """
    if path is None:
        return
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ConfigError(
            f"{flag} {path} cannot be written to ({error.strerror}); name another file"
        ) from error
    if os.path.isdir(path):
        raise ConfigError(f"{flag} {path} is a folder; name a file in it")
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise ConfigError(f"{flag} {path} cannot be written to (permission denied); name another file")
    if is_written_through(path):
        return
    folder = Path(os.path.realpath(path)).parent
    try:
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"{flag} {path}: {folder} cannot be written to ({error.strerror}); name another folder"
        ) from error
