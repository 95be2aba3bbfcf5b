"""Run the application with uvicorn: bind, announce, and drain at the end."""

import contextlib
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from dparallel.config.base import UserError
from dparallel.serving.limits import Limits

DRAIN_MARGIN = 10.0  # seconds beyond the time limit of a request, for sending the last responses
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def bound_socket(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        UserError: the address cannot be used.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--host {host} --port {port}: {reason}; give another address or port") from error


def address_of(listening: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Server(uvicorn.Server):
    """Calls `ready` when it answers requests. On SIGTERM or Ctrl-C it accepts no more, and finishes all."""

    def __init__(self, app: FastAPI, limits: Limits, ready: Callable[[], None] | None = None):
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                ws="none",
                timeout_graceful_shutdown=int(limits.timeout + DRAIN_MARGIN),
            )
        )
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self.ready is not None:
            self.ready()


def run(app: FastAPI, listening: socket.socket, limits: Limits, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or Ctrl-C; returns when all accepted requests are answered.

    A second Ctrl-C ends it at once.
    """
    with _signals_end_here():
        Server(app, limits, ready).run(sockets=[listening])


@contextlib.contextmanager
def _signals_end_here() -> Iterator[None]:
    """uvicorn raises the signals that it has handled once more at its end; they have had their effect."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
