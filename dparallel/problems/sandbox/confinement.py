"""The command that starts a confined Python, for each mode, and what a host must have for it."""

import functools
import os
import random
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from dparallel.problems.sandbox import seccomp, system
from dparallel.problems.sandbox.jobs import MODES, Mode, SandboxError

# Users of the host that nothing else runs as: NPROC counts the processes of a user, and none of root's.
UNPRIVILEGED = range(61200, 65500)
NAMESPACES = ("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts")
ISOLATED = ("-S", "-s", "-P", "-B", "-X", "utf8")  # no site-packages, no user's, no working folder, UTF-8
ENVIRONMENT = {"PYTHONHASHSEED": "0"}  # all that is set; verdicts do not depend on the order of sets
INSTALL = "install it (Debian and Ubuntu: `apt-get install bubblewrap`, Fedora: `dnf install bubblewrap`)"


@dataclass(frozen=True)
class Start:
    """How a confined process is started.

    Attributes:
        command: arguments up to the interpreter's own.
        uid: the user that the process changes to; None if it does not run as root.
        enters: whether the process itself makes its file system; it always makes `/tmp` and the filter.
    """

    command: tuple[str, ...]
    uid: int | None
    enters: bool


def start(mode: Mode) -> Start:
    """How one process is started.

    Raises:
        SandboxError: what the mode needs is missing.
    """
    if mode not in MODES:
        raise SandboxError(f"sandbox={mode!r}: known modes are {', '.join(MODES)}")
    root = os.getuid() == 0
    uid = unprivileged() if root else None
    python = (system.interpreter(), *ISOLATED)
    if mode == "unshare":
        user = str(UNPRIVILEGED.start)
        own = () if root else ("--user", f"--map-user={user}", f"--map-group={user}", "--keep-caps")
        return Start(("setpriv", "--pdeathsig", "KILL", *_unshare(), *own, *python), uid, True)
    return Start((*_bubblewrap(), *_places(), *(_as_root() if root else _as_user()), *python), uid, False)


def unprivileged() -> int:
    """A random user that is not root, and exists in this user namespace.

    Raises:
        SandboxError: there is none.
    """
    users, groups = (Path(f"/proc/self/{kind}_map").read_text(encoding="ascii") for kind in ("uid", "gid"))
    mapped = _mapped(users) & _mapped(groups)
    if not mapped:
        raise SandboxError(
            f"generated code must not run as root, and of the users {UNPRIVILEGED.start} to "
            f"{UNPRIVILEGED.stop - 1} this container maps none: run it with a full range of users "
            "(`podman --userns=auto:size=65536`), or as a user other than root"
        )
    return random.choice(sorted(mapped))


@functools.cache
def _mapped(text: str) -> set[int]:
    """Those of UNPRIVILEGED in a map of a user namespace: lines of first id, id outside, count."""
    found: set[int] = set()
    for line in text.splitlines():
        first, _, count = map(int, line.split())
        found |= set(range(max(first, UNPRIVILEGED.start), min(first + count, UNPRIVILEGED.stop)))
    return found


@functools.cache
def _bubblewrap() -> tuple[str, ...]:
    found = shutil.which("bwrap")
    if sys.platform != "linux" or found is None:
        where = INSTALL if sys.platform == "linux" else "judge on a Linux machine"
        raise SandboxError(
            f"generated code runs in bubblewrap, whose command bwrap is not on this machine: {where}. "
            "Weaker, and only if you ask for it: DPARALLEL_SANDBOX=unshare"
        )
    if seccomp.program(os.uname().machine) is None:
        raise SandboxError(
            f"there is no system call filter for {os.uname().machine}: judge on x86_64 or aarch64. Weaker, "
            "and only if you ask for it: DPARALLEL_SANDBOX=unshare"
        )
    return (
        found,
        *NAMESPACES,
        "--unshare-cgroup-try",
        "--hostname",
        "sandbox",
        "--new-session",
        "--die-with-parent",
    )


def _as_root() -> tuple[str, ...]:
    """No user namespace, in which processes would stay root's: the process itself changes its user."""
    wanted = ("CAP_SETUID", "CAP_SETGID", "CAP_SYS_ADMIN")
    return ("--cap-drop", "ALL", *(part for name in wanted for part in ("--cap-add", name)))


def _as_user() -> tuple[str, ...]:
    return (
        "--unshare-user",
        "--uid",
        str(UNPRIVILEGED.start),
        "--gid",
        str(UNPRIVILEGED.start),
        "--cap-add",
        "CAP_SYS_ADMIN",
    )


def _places() -> tuple[str, ...]:
    arguments: list[str] = []
    for kind, source, target in system.mounts():
        if kind == "empty":
            arguments += ["--perms", "0755", "--dir", target]
        elif kind == "hidden":
            arguments += ["--size", "4096", "--tmpfs", target, "--remount-ro", target]
        else:
            arguments += ["--dev-bind" if source.startswith("/dev/") else "--ro-bind", source, target]
    return (*arguments, "--remount-ro", "/")


@functools.cache
def _unshare() -> tuple[str, ...]:
    missing = [name for name in ("unshare", "setpriv") if shutil.which(name) is None]
    if sys.platform != "linux" or missing:
        raise SandboxError(
            f"the sandbox mode 'unshare' needs util-linux's commands unshare and setpriv: no {missing[0]}"
        )
    return ("unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child")


def remedy(said: str) -> str:
    """What to do after a sandbox did not start.

    Args:
        said: what its commands wrote.
    """
    if re.search(r"[Uu]nknown option", said):
        return "its version is too old: bubblewrap 0.8, or util-linux 2.36, is needed"
    return (
        "the kernel or a container does not permit new namespaces. Ordinary users need "
        "`sysctl kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000` "
        "(Ubuntu: `kernel.apparmor_restrict_unprivileged_userns=0`, and no AppArmor profile for bwrap); in "
        "Docker or Podman start the "
        "container with `--cap-add SYS_ADMIN --security-opt seccomp=unconfined --security-opt "
        "apparmor=unconfined`"
    )
