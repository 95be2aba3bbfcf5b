"""The tests' process: runs the tests, which call the candidate over a pipe, and writes the verdict.

Every comparison is made here, on data of exact builtin types. Objects of the candidate that are not plain
data are seen through `Remote`, whose equality is identity and which has no arithmetic and no order.
"""

from __future__ import annotations

import _ast
import builtins
import os
import sys
import types

from dparallel.problems.sandbox.inside.codec import ProtocolError, Reference, decode, encode, receive, send

TYPE_CHECKING = False  # as in codec.py
if TYPE_CHECKING:
    from typing import Any

NOTE = 300  # characters of a note
READY = b"ready\n"
PASSED = b"passed "
FAILED = b"failed "
# StopIteration would end an iteration of the tests; the last two are not made from a text.
NOT_RAISED = (StopIteration, StopAsyncIteration, UnicodeError, ExceptionGroup)
GONE = "the candidate ended its process or closed its pipe"


class CandidateError(Exception):
    """The candidate raised an exception that is not a builtin one, or one that ends a process."""


class Channel:
    """The pipe to the candidate.

    Attributes:
        broken: why the candidate cannot be asked any more; no verdict counts after that.
        raised: the last exception that the candidate raised.
    """

    def __init__(self, requests: int, replies: int, limit: int) -> None:
        self.requests, self.replies, self.limit = requests, replies, limit
        self.broken = ""
        self.raised: BaseException | None = None

    def greet(self) -> None:
        receive(self.replies, self.limit)

    def ask(self, operation: str, *arguments: Any) -> Any:
        """The result of an operation in the candidate's process.

        Raises:
            Exception: the builtin exception that the candidate raised, or CandidateError.
        """
        if self.broken:
            raise CandidateError(self.broken)
        request = encode((operation, *arguments), _refer)
        if len(request) > self.limit:
            raise ValueError(f"the arguments take {len(request)} bytes: at most {self.limit}")
        try:
            send(self.requests, request)
            reply = decode(receive(self.replies, self.limit), lambda reference: Remote(self, reference))
            succeeded, *result = reply if type(reply) is tuple else (None,)
            if succeeded is True and len(result) == 1:
                return result[0]
            if succeeded is not False or [type(part) for part in result] != [str, str]:
                raise ProtocolError("a reply that is none")
        except (EOFError, BrokenPipeError):
            self.broken = GONE
        except ProtocolError as error:
            self.broken = f"the candidate sent {error}"
        if self.broken:
            raise CandidateError(self.broken)
        self.raised = raised(*result)
        raise self.raised


def raised(name: str, text: str) -> Exception:
    """The exception that stands for one of the candidate's.

    `StopIteration` does not: in a `map` or a `zip` of the tests it would end them as if they had passed.
    """
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, NOT_RAISED):
        return kind(text)
    return CandidateError(f"{name}: {text}")


def _refer(value: Any) -> Reference:
    if type(value) is Remote:
        return object.__getattribute__(value, "_reference")
    raise TypeError(
        f"the tests pass a {type(value).__name__} to the candidate: only plain data can be passed"
    )


class Remote:
    """An object in the candidate's process. Attributes, items, calls and iteration are asked of it.

    `==`, `in`, order and arithmetic are not: what they compare must be plain data.
    """

    __slots__ = ("_channel", "_reference")

    def __init__(self, channel: Channel, reference: Reference) -> None:
        object.__setattr__(self, "_channel", channel)
        object.__setattr__(self, "_reference", reference)

    def __eq__(self, other: object) -> bool:
        return type(other) is Remote and _refer(self).key == _refer(other).key

    def __hash__(self) -> int:
        return hash(_refer(self).key)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return _ask(self, "call", arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _ask(self, "getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask(self, "setattr", name, value)

    def __getitem__(self, key: Any) -> Any:
        return _ask(self, "getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        _ask(self, "setitem", key, value)

    def __iter__(self) -> Any:
        iterator = _ask(self, "iter")
        while type(item := _ask(iterator, "next")) is tuple and item:
            yield item[0]

    def __len__(self) -> int:
        return _exact(self, int, "len")

    def __bool__(self) -> bool:
        return _exact(self, bool, "bool")

    def __str__(self) -> str:
        return _exact(self, str, "str")


def _ask(remote: Any, operation: str, *arguments: Any) -> Any:
    if type(remote) is not Remote:
        raise CandidateError("the candidate sent something else than an iterator")
    return object.__getattribute__(remote, "_channel").ask(operation, remote, *arguments)


def _exact(remote: Remote, kind: type, operation: str) -> Any:
    result = _ask(remote, operation)
    if type(result) is not kind:
        raise CandidateError(f"the candidate's {operation}() gave a {type(result).__name__}")
    return result


def names_used(source: str) -> set[str]:
    """All names in a program: what `ast.walk` finds, without the time that importing `ast` takes."""
    found = set()
    left: list[Any] = [compile(source, "<tests>", "exec", _ast.PyCF_ONLY_AST, dont_inherit=True)]
    while left:
        node = left.pop()
        if isinstance(node, list):
            left += node
        elif isinstance(node, _ast.AST):
            left += [getattr(node, name, None) for name in node._fields]
            if isinstance(node, _ast.Name):
                found.add(node.id)
    return found


def namespace_of(tests: str, trusted: str, entry_points: tuple[str, ...], channel: Channel) -> dict[str, Any]:
    """Global variables of the tests: the trusted ones, modules of the standard library, the candidate's."""
    module = types.ModuleType("tests")
    sys.modules["tests"] = module
    space = module.__dict__
    if trusted:
        exec(compile(trusted, "<trusted>", "exec", dont_inherit=True), space)
    for name in names_used(tests) - set(entry_points) - space.keys() - set(dir(builtins)):
        if name in sys.stdlib_module_names:
            space[name] = __import__(name)
        else:
            space[name] = Remote(channel, Reference(name))
    return space | {name: Remote(channel, Reference(name)) for name in entry_points}


def judge(tests: str, trusted: str, entry_points: tuple[str, ...], channel: Channel) -> str:
    """Why the candidate fails its tests; "" if it passes."""
    try:
        space = namespace_of(tests, trusted, entry_points, channel)
        code = compile(tests, "<tests>", "exec", dont_inherit=True)
    except BaseException as error:
        return f"the tests cannot be run: {type(error).__name__}: {error}"
    try:
        channel.ask("load")
        exec(code, space)
    except BaseException as error:
        return channel.broken or described(error, tests, channel)
    return channel.broken


def described(error: BaseException, tests: str, channel: Channel) -> str:
    lines, frames = [], error.__traceback__
    while frames:
        if frames.tb_frame.f_code.co_filename == "<tests>":
            lines.append(frames.tb_lineno)
        frames = frames.tb_next
    where = f" at `{tests.splitlines()[lines[-1] - 1].strip()}`" if lines and lines[-1] else ""
    text = f"{error}" if isinstance(error, CandidateError) else f"{type(error).__name__}: {error}"
    if error is channel.raised:
        return f"the candidate raised {text}{where}"
    return (
        f"wrong{where}" if isinstance(error, AssertionError) and where else f"the tests raised {text}{where}"
    )


def run(
    tests: str,
    trusted: str,
    entry_points: tuple[str, ...],
    token: bytes,
    requests: int,
    replies: int,
    verdict: int,
    limit: int,
) -> None:
    """Run the tests and write the verdict.

    Args:
        token: what is written after `passed`; known to the caller and this process only.
        requests, replies, verdict: descriptors of the pipes to and from the candidate, and of the verdict.
        limit: bytes of one message.
    """
    channel = Channel(requests, replies, limit)
    channel.greet()
    os.write(verdict, READY)
    reason = judge(tests, trusted, entry_points, channel)
    if reason:
        note = "".join(letter if letter.isprintable() else " " for letter in reason[:NOTE])
        os.write(verdict, FAILED + note.encode("utf-8", "replace"))
        os._exit(1)
    os.write(verdict, PASSED + token)
    os._exit(0)
