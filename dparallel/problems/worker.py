"""A worker process of `problems.pool`. It runs as a file, so that it starts without torch, in 0.3 s.

It reads items from a socket, calls a function with each, and writes the results back as JSON. Whatever the
function prints is discarded.
"""

import contextlib
import ctypes
import json
import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

NOTE_LENGTH = 500  # characters of an error message
PR_SET_PDEATHSIG = 1


def main(descriptor: int, parent: int) -> None:
    """Serve the process `parent` through the socket `descriptor` until it closes the socket."""
    _end_with(parent)
    connection = Connection(descriptor)
    sys.path[:], package, memory, pickled = pickle.loads(connection.recv_bytes())
    _enter(package)
    _limit_memory(memory)
    try:
        function, prepare = pickle.loads(pickled)
    except BaseException as error:
        reply(connection, {"refused": f"worker processes cannot import a function ({describe(error)})"})
        return
    try:
        prepare()
    except BaseException as error:
        reply(connection, refusal(error) or {"broken": describe(error)})
        if refusal(error):
            return
        raise  # its traceback is printed
    _silence()
    reply(connection, {"ready": True})
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            reply(connection, result(function, connection.recv_bytes()))


def result(function: Callable[..., Any], pickled: bytes) -> dict[str, Any]:
    """The value of `function(*item)`, or a description of the exception that it raised."""
    try:
        return {"value": function(*pickle.loads(pickled))}
    except BaseException as error:  # also sys.exit() and KeyboardInterrupt
        if _is(error, "MachineBusy"):
            return {"lost": str(error)}
        return refusal(error) or {"error": describe(error)}


def refusal(error: BaseException) -> dict[str, Any]:
    """The message of a UserError: this machine cannot do the work at all. Empty for other exceptions."""
    return {"refused": str(error)} if _is(error, "UserError") else {}


def _is(error: BaseException, name: str) -> bool:
    """Whether an exception is of a class of the package, which is known by its name here."""
    return any(cls.__name__ == name for cls in type(error).__mro__)


def describe(error: BaseException) -> str:
    """Class and message of an exception, at most `NOTE_LENGTH` characters."""
    try:
        message = str(error)
    except Exception:
        message = "its message cannot be read"
    name = type(error).__name__
    return f"{name}: {message}"[:NOTE_LENGTH] if message else name


def reply(connection: Connection, answer: dict[str, Any]) -> None:
    """Send an answer as JSON."""
    try:
        written = json.dumps(answer)
    except (TypeError, ValueError, RecursionError, MemoryError) as error:
        written = json.dumps({"error": f"the result is no JSON value ({describe(error)})"})
    connection.send_bytes(written.encode())


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when the parent ends, even in the middle of an item."""
    with contextlib.suppress(OSError, AttributeError):  # only Linux has it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the parent process has ended")


def _enter(package: str) -> None:
    """Make the modules in the folder `package` importable without its `__init__`, which imports torch.

    That is run when a name that it defines is asked for.
    """
    module = ModuleType(os.path.basename(package))
    module.__path__ = [package]
    module.__file__ = os.path.join(package, "__init__.py")

    def define(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        del module.__dict__["__getattr__"]
        with open(os.path.join(package, "__init__.py"), encoding="utf-8") as file:
            exec(compile(file.read(), file.name, "exec"), module.__dict__)
        return getattr(module, name)

    module.__dict__["__getattr__"] = define
    sys.modules[module.__name__] = module


def _limit_memory(memory: int) -> None:
    """Refuse allocations beyond `memory` bytes, so that a call does not take the machine's memory."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _silence() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
