"""Save results of many prompts while decoding continues.

Results for a file are appended to FILE.partial in the order of completion; when all are present, they are
written to FILE in the order of the prompts, and FILE.partial is deleted. After an interruption, the same
command continues from FILE.partial. A FILE that has content already is not replaced. Results for stdout, a
pipe or a device are written in the order of the prompts, each as soon as all previous ones are present.
"""

import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dparallel.cli.prompts import Request, Result, result_line
from dparallel.config.base import UserError
from dparallel.stages.files import is_there, is_written_through, naming_the_file, write_atomically


class OutputError(UserError):
    """Results cannot be written; the message names the file and the remedy."""


def check_unused(out: Path | None) -> None:
    """Raise an OutputError if `out` has content already and no FILE.partial that could complete it."""
    if out is not None and _is_taken(out) and not is_there(_partial_of(out)):
        raise OutputError(_taken(out))


class Results(Protocol):
    """Results by index of the prompt, including those of an interrupted run."""

    done: dict[int, Result]

    def add(self, row: int, result: Result) -> None: ...

    def kept(self) -> str: ...


R = TypeVar("R", bound=Results)


@contextmanager
def collect(out: Path | None, requests: Sequence[Request], identity: Mapping[str, Any]) -> Iterator[Results]:
    """Collect results for `out`, or for stdout if it is None.

    Exceptions raised in the context get a note that says what is saved and how to continue.

    Args:
        identity: everything that determines the results, as JSON values by names for messages.

    Raises:
        OutputError: FILE.partial belongs to another identity, or another process is writing it, or FILE has
            content already.
        FileError: `out` cannot be written.
    """
    if out is None:
        with _noting(_Stream(requests, _print)) as results:
            yield results
    elif is_written_through(out):
        with naming_the_file(out):
            descriptor = os.open(out, os.O_WRONLY | os.O_APPEND)
        try:
            with _noting(_Stream(requests, partial(_write, out, descriptor))) as results:
                yield results
        finally:
            os.close(descriptor)
    else:
        begun = _Partial(out, requests, identity)
        try:
            with _noting(begun):
                yield begun
                begun.finish()
        finally:
            begun.close()


@contextmanager
def _noting(results: R) -> Iterator[R]:
    try:
        yield results
    except BaseException as error:
        error.add_note(results.kept())
        raise


class _Stream:
    """Writes lines in the order of the prompts, each as soon as all previous ones are present."""

    def __init__(self, requests: Sequence[Request], write: Callable[[bytes], None]):
        self.requests, self.write = requests, write
        self.done: dict[int, Result] = {}  # always empty: interrupted runs cannot be continued
        self.waiting: dict[int, Result] = {}
        self.written = 0

    def add(self, row: int, result: Result) -> None:
        self.waiting[row] = result
        while self.written in self.waiting:
            line = result_line(self.requests[self.written], self.waiting.pop(self.written))
            self.write(line.encode())
            self.written += 1

    def kept(self) -> str:
        return f"{self.written} of {len(self.requests)} results were written; --out FILE would have kept more"


class _Partial:
    """Results in FILE.partial: a line that identifies the command, then one line per result."""

    def __init__(self, out: Path, requests: Sequence[Request], identity: Mapping[str, Any]):
        self.out, self.requests = out, requests
        self.path = _partial_of(out)
        self.done: dict[int, Result] = {}
        with naming_the_file(self.path):
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._begin(dict(identity))
        except BaseException:
            os.close(self.descriptor)
            raise

    def _begin(self, identity: dict[str, Any]) -> None:
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"{self.path} is being written by another process; name another --out"
            ) from error
        except OSError:  # the file system does not support locks
            pass
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # drop a line that was cut off by a kill
        if _line(identity).startswith(content):
            os.ftruncate(self.descriptor, 0)
            self._append(identity)
            return
        try:
            begun, *lines = [json.loads(line) for line in whole.splitlines()]
            results = {int(line.pop("row")): Result(**line) for line in lines}
            names = sorted(begun.keys() | identity.keys())
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise OutputError(
                f"{self.path} is damaged, or was not written by this command: move it away"
            ) from error
        if others := [name for name in names if begun.get(name) != identity.get(name)]:
            raise OutputError(
                f"{self.path} holds {len(results)} results of a command with another {', '.join(others)}: "
                "give that command again to complete them, or delete the file to start anew"
            )
        if len(results) < len(self.requests) and _is_taken(self.out):
            raise OutputError(_taken(self.out))
        os.ftruncate(self.descriptor, len(whole))
        self.done = results

    def add(self, row: int, result: Result) -> None:
        self._append({"row": row, **asdict(result)})
        self.done[row] = result

    def _append(self, value: dict[str, Any]) -> None:
        _write(self.path, self.descriptor, _line(value))

    def finish(self) -> None:
        lines = (result_line(request, self.done[row]) for row, request in enumerate(self.requests))
        write_atomically(self.out, "".join(lines))
        self.path.unlink()

    def kept(self) -> str:
        if not self.done:
            return "no result was decoded"
        count = f"{len(self.done)} of {len(self.requests)} results are kept in {self.path}"
        return f"{count}; run the same command again to continue"

    def close(self) -> None:
        """Close the file, and delete it if it contains no results."""
        if not self.done:
            self.path.unlink(missing_ok=True)
        os.close(self.descriptor)


def _partial_of(out: Path) -> Path:
    target = out.resolve()
    return target.with_name(f"{target.name}.partial")


def _is_taken(out: Path) -> bool:
    """Whether a file has content that writing to `out` would replace."""
    return not is_written_through(out) and is_there(out) and out.stat().st_size > 0


def _taken(out: Path) -> str:
    return f"--out {out} has content already, which would be replaced: delete it, or name another file"


def _line(value: dict[str, Any]) -> bytes:
    return (json.dumps(value) + "\n").encode()


def _print(line: bytes) -> None:
    sys.stdout.write(line.decode())
    sys.stdout.flush()


def _write(path: Path, descriptor: int, content: bytes) -> None:
    try:
        with naming_the_file(path):
            while content:
                content = content[os.write(descriptor, content) :]
    except BrokenPipeError as error:
        raise OutputError(f"{path}: its reader has left") from error
