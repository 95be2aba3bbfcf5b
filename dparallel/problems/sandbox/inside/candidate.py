"""The candidate's process: runs the candidate and answers the tests' requests.

Nothing here is secret or trusted: whatever the candidate does to it, the tests receive plain data.
"""

from __future__ import annotations

import os
import sys
import types

from dparallel.problems.sandbox.inside.codec import Reference, decode, encode, receive, send

TYPE_CHECKING = False  # as in codec.py
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

HELLO = b"ready"


def serve(source: str, requests: int, replies: int, limit: int) -> None:
    """Answer requests until the tests close the pipe.

    Args:
        source: the candidate program.
        requests, replies: descriptors of the pipes from and to the tests.
        limit: bytes of one message.
    """
    send(replies, HELLO)
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    kept: list[Any] = []  # objects that the tests refer to by their place
    places: dict[int, int] = {}  # by `id`, which stays theirs while they are kept

    def keep(value: Any) -> Reference:
        place = places.setdefault(id(value), len(kept))
        if place == len(kept):
            kept.append(value)
        return Reference(place)

    def resolve(reference: Reference) -> Any:
        if isinstance(reference.key, int):
            return kept[reference.key]
        return named(module, reference.key)

    while True:
        try:
            request = receive(requests, limit)
        except EOFError:
            os._exit(0)
        try:
            name, *arguments = decode(request, resolve)
            if name == "load":
                exec(compile(source, "<candidate>", "exec", dont_inherit=True), module.__dict__)
                reply = encode((True, None), keep)
            else:
                reply = encode((True, OPERATIONS[name](*arguments)), keep)
            if len(reply) > limit:
                raise ValueError(f"the result takes {len(reply)} bytes: at most {limit}")
        except BaseException as error:
            reply = encode((False, *described(error)), keep)
        send(replies, reply)


def named(module: types.ModuleType, name: str) -> Any:
    if name not in module.__dict__:
        raise NameError(f"name {name!r} is not defined")
    return module.__dict__[name]


def described(error: BaseException) -> tuple[str, str]:
    """Name of an exception's first builtin class, and its text with the class it really has."""
    base = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
    try:
        text = str(error)[:500]
    except BaseException:
        text = ""
    return base.__name__, text if base is type(error) else f"{type(error).__name__}: {text}"


OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, arguments, named: function(*arguments, **named),
    "getattr": getattr,
    "setattr": setattr,
    "getitem": lambda item, key: item[key],
    "setitem": lambda item, key, value: item.__setitem__(key, value),
    "iter": lambda item: _Iterator(item),
    "next": lambda iterator: iterator.following(),
    "len": len,
    "bool": bool,
    "str": str,
}


class _Iterator:
    """Gives the items of an iterable as 1-tuples, then an empty tuple."""

    def __init__(self, items: Any) -> None:
        self.items = iter(items)

    def following(self) -> tuple[Any, ...]:
        for item in self.items:
            return (item,)
        return ()
