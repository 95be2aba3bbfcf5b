"""Folders to which the paths of runs are limited on workers, whoever starts these runs.

The variable `DPARALLEL_ROOTS` holds them, separated by commas: folders of this machine, and URLs of stores.
`make up` sets it for its workers. Without it nothing is limited, as for commands on one's own machine.
"""

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dparallel.config.base import ConfigError
from dparallel.config.paths import DEEPSPEED_FILES, PATHS, is_url, looks_local, shipped_configs

ROOTS = "DPARALLEL_ROOTS"
CREATED = ("runs", "out", *DEEPSPEED_FILES)  # paths in any form, since they need not exist


def check_inside_roots(settings: Any) -> None:
    """Check all paths of a config's settings, which are JSON values.

    Raises:
        ConfigError: names the setting, the path and the folders that are allowed.
    """
    for key, path in _paths(settings):
        check_path(key, path)


def roots() -> list[str]:
    """The folders and URLs to which paths are limited; empty if they are not."""
    stated = [root.strip() for root in os.environ.get(ROOTS, "").split(",")]
    return [root for root in stated if root]


def check_path(key: str, path: str) -> None:
    """Check the path of a setting `key`; files that come with the package are always allowed.

    Raises:
        ConfigError: as `check_inside_roots`.
    """
    allowed = roots()
    if allowed and not any(_is_inside(path, root) for root in [*allowed, str(shipped_configs().parent)]):
        raise ConfigError(
            f"{key}={path}: outside of the folders that runs may use on this worker ({', '.join(allowed)}): "
            f"move it there, or add its folder to {ROOTS} of the worker (in .env for `make up`)"
        )


def _paths(settings: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Settings that are a path, and those below `data_files`, each with its full name."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            full = f"{key}.{name}" if key else str(name)
            inside = name in PATHS or key.rpartition(".")[2] == "data_files"
            if inside and isinstance(value, str):
                if looks_local(value) or is_url(value) or os.path.lexists(value) or name in CREATED:
                    yield full, value
            else:
                yield from _paths(value, full)
    elif isinstance(settings, list):
        for place, value in enumerate(settings):
            yield from _paths(value, f"{key}.{place}")


def _is_inside(path: str, root: str) -> bool:
    path, root = path.removeprefix("file://"), root.removeprefix("file://")
    if is_url(path) or is_url(root):
        clean = ".." not in path.split("/")
        return clean and (path == root.rstrip("/") or path.startswith(f"{root.rstrip('/')}/"))
    real, folder = _real(path), _real(root)
    return real == folder or folder in real.parents


def _real(path: str) -> Path:
    """The path without links; of a pattern, the part before it, or `/` if it leads up again after that."""
    fixed, pattern = path, ""
    if glob.has_magic(path):
        fixed = re.split(r"[*?\[]", path)[0].rpartition("/")[0] or ("/" if path.startswith("/") else ".")
        pattern = path.removeprefix(fixed)
    return Path(os.path.realpath("/" if ".." in pattern.split("/") else os.path.expanduser(fixed)))
