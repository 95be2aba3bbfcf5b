"""Start one confined Python process that calls a function of `inside/`."""

import contextlib
import functools
import marshal
import math
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from dparallel.problems.sandbox import confinement, seccomp, system
from dparallel.problems.sandbox.jobs import Limits, Mode

INSIDE = Path(__file__).parent / "inside"
PACKAGE = "dparallel.problems.sandbox.inside"
SPARE_PROCESSES = 2  # of the sandbox's own, which count as the user's
# Makes the modules from the code on standard input, then calls a function of one of them. The code is
# compiled outside, by the same Python, so that nothing of this project is visible inside.
BOOTSTRAP = f"""
import marshal, sys, types
with open(0, "rb", closefd=False) as file:
    modules, mounts, private, program, limits, uid, (module, function), arguments = marshal.load(file)
for name, code in modules:
    sys.modules["{PACKAGE}." + name] = types.ModuleType(name)
    exec(code, sys.modules["{PACKAGE}." + name].__dict__)
def inside(name):
    return sys.modules["{PACKAGE}." + name]
if mounts:
    inside("lockdown").enter(mounts)
inside("lockdown").make_private(*private)
inside("limits").limit(**limits)
inside("limits").become(uid)
inside("lockdown").give_up_capabilities()
inside("lockdown").end_with_parent()
inside("lockdown").forbid(program)
inside("limits").silence()
getattr(inside(module), function)(**arguments)
"""


@contextlib.contextmanager
def confined(
    mode: Mode,
    limits: Limits,
    function: tuple[str, str],
    arguments: dict[str, Any],
    ends: Sequence[BinaryIO],
    complaints: BinaryIO,
) -> Iterator[subprocess.Popen[bytes]]:
    """A confined process, killed at the end with everything it started.

    Args:
        function: names of a module of `inside/` and of its function that the process calls.
        arguments: its arguments, of types that `marshal` takes.
        ends: pipes' ends, which the process inherits under the same numbers.
        complaints: where it is written why the process cannot be started.

    Raises:
        SandboxError: see `confinement.start`.
    """
    how = confinement.start(mode)
    mounts = tuple(map(tuple, system.mounts())) if how.enters else ()
    private = (system.PRIVATE, limits.disk, limits.entries)
    program = seccomp.program(os.uname().machine) or b""
    most = {
        "memory": limits.memory,
        "seconds": math.ceil(limits.seconds),
        "disk": limits.disk,
        "files": limits.files,
        "threads": limits.threads + SPARE_PROCESSES,
    }
    modules = _modules(function[0])
    work = marshal.dumps((modules, mounts, private, program, most, how.uid, function, arguments))
    with _memory(work) as code:
        process = subprocess.Popen(
            [*how.command, "-c", BOOTSTRAP],
            stdin=code,
            stdout=subprocess.DEVNULL,
            stderr=complaints,
            env=confinement.ENVIRONMENT,
            start_new_session=True,  # else signals to the process group would reach this process
            pass_fds=[end.fileno() for end in ends],
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def pipe() -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The ends of a pipe for reading and writing, unbuffered."""
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as read_end, open(writing, "wb", buffering=0) as write_end:
        yield read_end, write_end  # type: ignore[misc]


@contextlib.contextmanager
def _memory(content: bytes) -> Iterator[BinaryIO]:
    """A file in memory."""
    with open(os.memfd_create("sandbox"), "w+b") as file:
        file.write(content)
        file.seek(0)
        yield file


@functools.cache
def _modules(main: str) -> tuple[tuple[str, Any], ...]:
    """Names and compiled code of the modules of `inside/` that `main` needs, imported ones first."""
    return tuple(
        (name, compile((INSIDE / f"{name}.py").read_text(encoding="utf-8"), name, "exec", optimize=2))
        for name in ("limits", "lockdown", "codec", main)
    )
