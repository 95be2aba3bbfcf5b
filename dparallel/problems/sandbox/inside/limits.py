"""The last steps of confinement, taken inside by trusted code before any generated code runs.

Imports the standard library only.
"""

import os
import resource


def limit(memory: int, seconds: int, disk: int, files: int, threads: int) -> None:
    """Set the hard limits of this process."""
    for name, most in {
        "AS": memory,
        "FSIZE": disk,
        "NOFILE": files,
        "NPROC": threads,
        "CORE": 0,
        "MEMLOCK": 0,
    }.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    # SIGXCPU first: SIGKILL alone could also be the end of a process that found no memory on the machine
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))


def become(uid: int | None) -> None:
    """Change to an unprivileged user if this process is root; None if it is not."""
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def silence() -> None:
    """Discard output, and give an empty input."""
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
