"""The last steps that need rights: `/tmp`, the system call filter; without bubblewrap, the whole file system.

bubblewrap limits the bytes of a file system in memory, but not its number of files, and its filter would
forbid to mount another one.

Trusted code, run in new namespaces before any generated code. Imports the standard library only.
"""

from __future__ import annotations

import ctypes
import os
import signal

TYPE_CHECKING = False  # as in codec.py
if TYPE_CHECKING:
    from collections.abc import Sequence

MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 0x1, 0x20, 0x1000, 0x4000, 0x40000
MS_NOSUID, MS_NODEV = 0x2, 0x4
LOCKED = {0x8: 0x8, 0x400: 0x400, 0x800: 0x800, 0x1000: 1 << 21}  # statvfs flag: mount flag; must be kept
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
SECCOMP_MODE_FILTER = 2
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}


def enter(mounts: Sequence[tuple[str, str, str]]) -> None:
    """Make the mounts the file system of these namespaces, and give them a host name.

    Args:
        mounts: (kind, source, target) as `system.mounts` gives them.
    """
    _call("sethostname", b"sandbox", 7)
    root = "/proc"  # exists everywhere and holds none of the sources
    _mount("", "/", "", MS_REC | MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for kind, source, target in mounts:
        place = root + target
        if kind == "file":
            os.close(os.open(place, os.O_CREAT | os.O_WRONLY, 0o644))
        elif not os.path.isdir(place):
            os.mkdir(place, 0o755)
        if kind in ("file", "folder"):
            _mount(source, place, "", MS_BIND)
            kept = sum(flag for seen, flag in LOCKED.items() if os.statvfs(place).f_flag & seen)
            device = 0 if source.startswith("/dev/") else MS_NODEV
            _mount("", place, "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | device | kept)
        elif kind == "hidden":
            _mount("tmpfs", place, "tmpfs", MS_NOSUID | MS_NODEV | MS_RDONLY, "size=4k,mode=755")
    os.chdir(root)
    _call("syscall", SYS_PIVOT_ROOT[os.uname().machine], b".", b".")
    _call("umount2", b".", MNT_DETACH)
    os.chdir("/")
    _mount("", "/", "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def make_private(folder: str, disk: int, entries: int) -> None:
    """Make a folder empty, writable and limited, and the working folder."""
    options = f"size={disk},nr_inodes={entries + 1},mode=1777"  # one is the folder itself
    _mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, options)
    os.chdir(folder)


def give_up_capabilities() -> None:
    """No capability now, none by `execve` later."""
    drop = ctypes.CDLL(None).prctl
    for capability in range(64):
        drop(PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails for numbers unknown here
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _call("capset", header, (ctypes.c_uint32 * 6)())


def end_with_parent() -> None:
    """Again, since a process that changes its user forgets it."""
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def forbid(program: bytes) -> None:
    """Install a system call filter, and no new privileges."""

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]

    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if program:
        instructions = Program(len(program) // 8, program)
        _call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(instructions), 0, 0)


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    _call("mount", source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())


def _call(function: str, *arguments: object) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}{arguments}: {os.strerror(number)}")
