"""Values on the pipe between the tests and the candidate: plain data, and references to anything else.

Decoding makes exact builtin types and calls no code of the sender, unlike pickle. An instance of a subclass
of a plain type is sent as the plain type. Runs inside the sandbox: imports the standard library only.
"""

from __future__ import annotations

import os
import sys

# Both processes of every verdict import this module: `typing` and the like would double their start.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

DEPTH = 100  # nesting of containers
HEADER = 8  # bytes of a message's length


class Reference:
    """An object that stays in the candidate's process: by number, or a global variable of it by name."""

    def __init__(self, key: int | str) -> None:
        self.key = key


class ProtocolError(Exception):
    """A message is no encoded value, or is too large or too deeply nested."""


def encode(value: Any, refer: Callable[[Any], Reference]) -> bytes:
    """Encode plain data.

    Args:
        refer: gives the reference that is sent for an object that is not plain; may raise.
    """
    out = bytearray()
    _write(value, out, refer, 0)
    return bytes(out)


def _text(out: bytearray, tag: bytes, content: bytes) -> None:
    out += b"%b%d:" % (tag, len(content))
    out += content


def _write(value: Any, out: bytearray, refer: Callable[[Any], Reference], depth: int) -> None:
    if depth > DEPTH:
        raise ProtocolError(f"a value is nested deeper than {DEPTH}")
    kind = _kind(value)
    if kind is None:
        reference = refer(value).key
        if isinstance(reference, str):
            _text(out, b"g", reference.encode("utf-8", "surrogatepass"))
        else:
            _text(out, b"h", b"%d" % reference)
    elif kind is bool or kind is type(None):
        out += {None: b"n", True: b"t", False: b"f"}[value]
    elif kind is int:
        _text(out, b"i", b"%x" % value)
    elif kind is float:
        _text(out, b"d", float.hex(value).encode())
    elif kind is complex:
        _text(out, b"c", f"{float.hex(value.real)} {float.hex(value.imag)}".encode())
    elif kind is str:
        _text(out, b"s", str.encode(value, "utf-8", "surrogatepass"))
    elif kind is bytes or kind is bytearray:
        _text(out, b"b" if kind is bytes else b"a", bytes(value))
    elif kind in NUMBERS:
        _text(out, NUMBERS[kind], str(value).encode())
    elif kind is range:
        _items(out, b"r", (value.start, value.stop, value.step), refer, depth)
    elif kind in MAPPINGS:
        items = dict.items(value) if kind is dict else value
        _items(out, MAPPINGS[kind], [part for item in items for part in item], refer, depth)
    else:
        _items(out, CONTAINERS[kind], list(value), refer, depth)


def _items(out: bytearray, tag: bytes, items: Any, refer: Callable[[Any], Reference], depth: int) -> None:
    out += b"%b%d:" % (tag, len(items))
    for item in items:
        _write(item, out, refer, depth + 1)


_KEYS: Any = type({}.keys())
_VALUES: Any = type({}.values())
_ITEMS: Any = type({}.items())
CONTAINERS: dict[Any, bytes] = {
    list: b"l",
    tuple: b"u",
    set: b"S",
    frozenset: b"Z",
    _KEYS: b"K",
    _VALUES: b"V",
}
MAPPINGS: dict[Any, bytes] = {dict: b"D", _ITEMS: b"I"}
NUMBERS: dict[Any, bytes] = {}  # Fraction and Decimal, where the sender has imported them
PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray, range, *CONTAINERS, *MAPPINGS)
_EXACT = frozenset(PLAIN)


def _kind(value: Any) -> Any:
    """The plain type as which a value is sent; None if it is sent as a reference."""
    kind = type(value)
    if kind in _EXACT:
        return kind
    for module, name, tag in (("fractions", "Fraction", b"q"), ("decimal", "Decimal", b"m")):
        number = getattr(sys.modules.get(module), name, None)
        if number is not None and issubclass(kind, number):
            NUMBERS[number] = tag
            return number
    return next((plain for plain in PLAIN if issubclass(kind, plain)), None)


def decode(data: bytes, resolve: Callable[[Reference], Any]) -> Any:
    """Decode one value.

    Args:
        resolve: gives the object for a reference.

    Raises:
        ProtocolError: the data is not what `encode` makes.
    """
    try:
        value, end = _read(data, 0, resolve, 0)
    except ProtocolError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, ArithmeticError) as error:
        raise ProtocolError(f"no encoded value: {type(error).__name__}") from None
    if end != len(data):
        raise ProtocolError("bytes behind a value")
    return value


def _read(data: bytes, at: int, resolve: Callable[[Reference], Any], depth: int) -> tuple[Any, int]:
    if depth > DEPTH:
        raise ProtocolError(f"a value is nested deeper than {DEPTH}")
    tag = data[at : at + 1]
    if tag in CONSTANTS:
        return CONSTANTS[tag], at + 1
    colon = data.index(b":", at, at + 24)
    digits = data[at + 1 : colon]
    if not digits.isdigit():
        raise ProtocolError("no encoded value: its length is no number")
    count, at = int(digits), colon + 1
    if tag in TEXTS:
        content = data[at : at + count]
        if len(content) != count:
            raise ProtocolError("a value is cut off")
        if tag == b"h":
            return resolve(Reference(int(content))), at + count
        if tag == b"g":
            return resolve(Reference(content.decode("utf-8", "surrogatepass"))), at + count
        return TEXTS[tag](content), at + count
    if count > len(data) - at:
        raise ProtocolError("a value is cut off")
    items = []
    for _ in range(count):
        item, at = _read(data, at, resolve, depth + 1)
        items.append(item)
    return BUILD[tag](items), at


def _complex(content: bytes) -> complex:
    real, imaginary = content.decode("ascii").split(" ")
    return complex(float.fromhex(real), float.fromhex(imaginary))


def _fraction(content: bytes) -> Any:
    from fractions import Fraction

    return Fraction(content.decode("ascii"))


def _decimal(content: bytes) -> Any:
    from decimal import Decimal

    return Decimal(content.decode("ascii"))


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))


CONSTANTS = {b"n": None, b"t": True, b"f": False}
TEXTS: dict[bytes, Callable[[bytes], Any]] = {
    b"i": lambda content: int(content, 16),
    b"d": lambda content: float.fromhex(content.decode("ascii")),
    b"c": _complex,
    b"s": lambda content: content.decode("utf-8", "surrogatepass"),
    b"b": bytes,
    b"a": bytearray,
    b"q": _fraction,
    b"m": _decimal,
    b"h": int,
    b"g": str,
}
BUILD: dict[bytes, Callable[[list[Any]], Any]] = {
    b"l": list,
    b"u": tuple,
    b"S": set,
    b"Z": frozenset,
    b"D": _pairs,
    b"r": lambda items: range(*items),
    b"K": lambda items: dict.fromkeys(items).keys(),
    b"V": lambda items: dict(enumerate(items)).values(),
    b"I": lambda items: _pairs(items).items(),
}


# Messages


def send(descriptor: int, content: bytes) -> None:
    """Write a message: its length, then its content."""
    left = memoryview(len(content).to_bytes(HEADER, "big") + content)
    while left:
        left = left[os.write(descriptor, left) :]


def receive(descriptor: int, limit: int) -> bytes:
    """Read a message.

    Raises:
        EOFError: the other end is closed.
        ProtocolError: it is longer than `limit` bytes.
    """
    length = int.from_bytes(_exactly(descriptor, HEADER), "big")
    if length > limit:
        raise ProtocolError(f"a message of {length} bytes: at most {limit}")
    return _exactly(descriptor, length)


def _exactly(descriptor: int, count: int) -> bytes:
    content = bytearray()
    while len(content) < count:
        part = os.read(descriptor, min(count - len(content), 1 << 16))
        if not part:
            raise EOFError
        content += part
    return bytes(content)
