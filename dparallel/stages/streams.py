"""Encodings of the standard streams, the same for every command; and of the files of other libraries."""

import codecs
import contextlib
import io
import locale
import os
import sys


def set_encodings() -> None:
    """Use UTF-8 for files and pipes; terminals keep their encoding, with escapes for missing characters.

    Call it first in every command: in other locales, printing a result could fail after hours of work.
    """
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(io.UnsupportedOperation):  # input that was read from keeps its encoding
                stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors=errors)


def restart_in_utf8_mode(program: str) -> None:
    """Where the locale's encoding is not UTF-8, restart this program in Python's UTF-8 mode.

    Some libraries, such as torch's compiler, read and write their files in the locale's encoding. Call it
    before input is read. The mode also holds for child processes.

    Args:
        program: the module that Python was started with; otherwise, as in a test, nothing is restarted.
    """
    spec = sys.modules["__main__"].__spec__
    is_utf8 = sys.flags.utf8_mode or codecs.lookup(locale.getencoding()).name == "utf-8"
    if is_utf8 or spec is None or spec.name != program or "utf8" in sys._xoptions:
        return
    os.environ["PYTHONUTF8"] = "1"
    arguments = map(_as_utf8, sys.orig_argv[1:])
    os.execv(sys.executable, [os.fsencode(sys.executable), b"-X", b"utf8", *arguments])


def _as_utf8(argument: str) -> bytes:
    """An argument in UTF-8. Bytes that are UTF-8 already, such as names of files, stay as they were given."""
    given = os.fsencode(argument)
    try:
        given.decode("utf-8")
    except UnicodeDecodeError:
        return argument.encode("utf-8", "surrogateescape")
    return given
