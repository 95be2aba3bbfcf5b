"""The file system in the sandbox: this Python's interpreter and standard library, and what they load."""

import functools
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from dparallel.problems.sandbox.jobs import SandboxError

SYSTEM_FOLDERS = re.compile(r"(/usr)?/lib(32|64)?(/[a-z0-9_]+-linux-[a-z0-9]+)?")
PRIVATE = "/tmp"
PACKAGES = ("site-packages", "dist-packages")  # of other people's code: not in the sandbox


class Mount(NamedTuple):
    """A place in the sandbox.

    Attributes:
        kind: `file` or `folder`, read-only from `source`; `empty`, a folder above others, or `PRIVATE`;
            `hidden`, an empty file system over a folder.
    """

    kind: str
    source: str
    target: str


@functools.cache
def interpreter() -> str:
    """The interpreter's own file, not the link in a virtual environment."""
    executable = getattr(sys, "_base_executable", sys.executable) or sys.executable
    return os.path.realpath(executable)


@functools.cache
def mounts() -> tuple[Mount, ...]:
    """All places, parents first.

    Raises:
        SandboxError: the libraries of the interpreter cannot be listed, or lie where the sandbox has its own.
    """
    library = sysconfig.get_path("stdlib")
    if hidden := [path for path in (interpreter(), library) if path.startswith(f"{PRIVATE}/")]:
        raise SandboxError(
            f"{hidden[0]} cannot be used in the sandbox, which has a {PRIVATE} of its own: judge with a "
            "Python that is installed in another folder"
        )
    places = [
        Mount("file", interpreter(), interpreter()),
        Mount("folder", os.path.realpath(library), library),
        *(Mount("hidden", "", f"{library}/{name}") for name in PACKAGES if Path(library, name).is_dir()),
        *_libraries(library),
        Mount("file", "/dev/null", "/dev/null"),
        Mount("empty", "", PRIVATE),
    ]
    parents = {str(parent) for place in places for parent in Path(place.target).parents} - {"/"}
    targets = {place.target for place in places}
    inside = {name for name in parents for folder in targets if name.startswith(f"{folder}/")}
    above = [Mount("empty", "", name) for name in parents - targets - inside]
    return tuple(sorted([*above, *places], key=lambda place: place.target.count("/")))


def _libraries(library: str) -> list[Mount]:
    """Shared libraries: folders of the system's as a whole, others one by one."""
    objects = [interpreter(), *map(str, Path(library, "lib-dynload").glob("*.so"))]
    try:
        listed = subprocess.run(["ldd", *objects], capture_output=True, text=True, encoding="utf-8").stdout
    except OSError as error:
        raise SandboxError(f"ldd cannot be run ({error}): install the C library's tools") from None
    found = {os.path.normpath(path) for path in re.findall(r"(/\S+) \(0x", listed)}
    folders = {os.path.dirname(path) for path in found if SYSTEM_FOLDERS.fullmatch(os.path.dirname(path))}
    single = {path for path in found if os.path.dirname(path) not in folders}
    single = {path for path in single if not path.startswith(f"{library}/")}
    return [
        *(Mount("folder", os.path.realpath(path), path) for path in folders),
        *(Mount("file", os.path.realpath(path), path) for path in single),
    ]
