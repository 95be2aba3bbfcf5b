"""The machines used for training, from DeepSpeed's hostfile."""

import re
import shutil
import socket
from pathlib import Path

from dparallel.config.base import ConfigError
from dparallel.config.experiment import LaunchConfig

LINE = re.compile(r"(\S+)\s+slots=([1-9]\d*)")


def world_size(config: LaunchConfig) -> int:
    """Number of training processes over all machines."""
    return config.processes if config.hostfile is None else sum(read_hostfile(config.hostfile).values())


def read_hostfile(path: str) -> dict[str, int]:
    """Number of processes (slots) per host, in the order of the file.

    Raises:
        ConfigError: the file is missing or unreadable, lists no host, lists a host twice, or has a line
            other than `HOST slots=N`.
    """
    file = Path(path)
    try:
        if not file.is_file():  # a pipe, which gives its lines once, is none either
            raise ConfigError(f"launch.hostfile={path}: no such file (looked in {Path.cwd()})")
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"launch.hostfile={path}: cannot be read ({error.strerror}): check its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"launch.hostfile={path}: not UTF-8 ({error}); save it as UTF-8") from error
    slots: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not (entry := line.partition("#")[0].strip()):
            continue
        found = LINE.fullmatch(entry)
        if found is None:
            raise ConfigError(f"launch.hostfile={path}, line {number}: {entry!r} is not HOST slots=N")
        host = found[1]
        if host in slots:
            raise ConfigError(f"launch.hostfile={path}, line {number}: host {host} is named twice")
        slots[host] = int(found[2])
    if not slots:
        raise ConfigError(f"launch.hostfile={path} names no host: write a line HOST slots=N for each")
    return slots


def is_this_machine(hosts: dict[str, int]) -> bool:
    """Whether the hostfile lists only this machine, so that no remote access is needed."""
    return set(hosts) <= {"localhost", "127.0.0.1", socket.gethostname()}


def check_hosts(config: LaunchConfig) -> None:
    """Raise a ConfigError for an invalid hostfile, or if programs for remote access are not installed."""
    if config.hostfile is None or is_this_machine(hosts := read_hostfile(config.hostfile)):
        return
    missing = [program for program in ("ssh", "pdsh") if shutil.which(program) is None]
    if missing:
        raise ConfigError(
            f"launch.hostfile={config.hostfile} names {', '.join(hosts)}, which are reached by ssh and pdsh; "
            f"not installed here: {', '.join(missing)}"
        )
