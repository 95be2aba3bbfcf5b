"""Processes that outlive the command that starts them, each in a session of its own."""

import contextlib
import errno
import hashlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

POLL_SECONDS = 0.2


class ServiceError(RuntimeError):
    """A server or a worker does not do what it should; the message says what and shows its log."""


@dataclass(frozen=True)
class Record:
    """A started process, as its file `pids/<name>.json` has it. Environments, with passwords, stay out."""

    name: str
    pid: int
    identity: int  # tells the process from a later one with the same number; the clock does not matter
    created: float  # seconds since 1970
    signature: str  # digest of the command and its settings

    def __post_init__(self) -> None:
        kinds = {"name": str, "pid": int, "identity": int, "created": int | float, "signature": str}
        if not all(isinstance(getattr(self, name), kind) for name, kind in kinds.items()) or self.pid < 1:
            raise ValueError("this is no record of a process")

    @property
    def process(self) -> psutil.Process | None:
        """The process, while it lives."""
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pid)
            if hash(process) == self.identity:
                return None if process.status() == psutil.STATUS_ZOMBIE else process
        return None

    def members(self) -> list[psutil.Process]:
        """The living processes of the session, also if its leader was killed, and their children."""
        with contextlib.suppress(psutil.Error):
            if hash(psutil.Process(self.pid)) != self.identity:
                return []  # the system gives no number to a new process while a session has it
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.getsid(process.pid) == self.pid:
                    found[process.pid] = process
        for process in list(found.values()):
            with contextlib.suppress(psutil.Error):
                found.update({child.pid: child for child in process.children(recursive=True)})
        return [process for process in found.values() if is_alive(process)]


class Processes:
    """The processes of a data folder: their records in `pids/`, their output in `logs/`."""

    def __init__(self, folder: Path):
        self.pids, self.logs = folder / "pids", folder / "logs"

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def records(self) -> dict[str, Record]:
        """Records by name, also of processes that have ended; damaged files are ignored."""
        found = {}
        for path in sorted(self.pids.glob("*.json")):
            with contextlib.suppress(ValueError, TypeError, OSError):
                record = Record(**json.loads(path.read_text(encoding="utf-8")))
                found[record.name] = record
        return found

    def start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], root: Path, signature: str
    ) -> Record:
        """Start a process in `root`; its previous log becomes `<name>.log.1`."""
        for folder in (self.pids, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        log = self.log(name)
        if log.exists():
            os.replace(log, log.with_name(f"{log.name}.1"))
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=root,
                env={**environment, "PWD": str(root)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            begun = psutil.Process(process.pid)
            record = Record(name, process.pid, hash(begun), begun.create_time(), signature)
            path = self.pids / f"{name}.json"
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(asdict(record)), encoding="utf-8")
            os.replace(partial, path)
        except BaseException:  # such as a full disk: nobody could stop it later
            process.kill()
            process.wait()
            raise
        process.returncode = 0  # no warning that it outlives this object: it is to outlive this program
        return record

    def forget(self, name: str) -> None:
        (self.pids / f"{name}.json").unlink(missing_ok=True)

    def last_lines(self, name: str, count: int = 15) -> str:
        """The end of a log, for an error message."""
        try:
            text = self.log(name).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(f"  {line}" for line in text.splitlines()[-count:])


def signature(command: Iterable[str], environment: Mapping[str, str]) -> str:
    """Digest of a command and its settings, from which neither can be read."""
    return hashlib.sha256(json.dumps([list(command), dict(environment)], sort_keys=True).encode()).hexdigest()


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def stop(records: Iterable[Record], seconds: float = 15.0) -> None:
    """End processes with all that they started: SIGTERM, then SIGKILL after `seconds`."""
    records = list(records)
    found = {process.pid: process for record in records for process in record.members()}
    leaders = [process for record in records if (process := record.process) is not None]
    for process in leaders or found.values():
        with contextlib.suppress(psutil.Error):
            process.terminate()
    end = time.monotonic() + seconds
    while any(map(is_alive, leaders)) and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
    # What they started meanwhile, and what does not end by itself.
    found.update({process.pid: process for record in records for process in record.members()})
    for process in found.values():
        with contextlib.suppress(psutil.Error):
            if is_alive(process):
                process.kill()
    psutil.wait_procs(list(found.values()), timeout=5)


def who_has(host: str, port: int) -> str | None:
    """Why a server cannot listen on a port, in words; None if it can."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return f"cannot be used ({error.strerror})"
        else:
            return None
    for connection in _connections():
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            with contextlib.suppress(psutil.Error):
                command = " ".join(psutil.Process(connection.pid).cmdline())
                return f"is in use by process {connection.pid} ({command[:80]})"
    return "is in use by a process of another user"


def _connections() -> list[Any]:
    try:
        return psutil.net_connections(kind="tcp")
    except psutil.Error:
        return []
