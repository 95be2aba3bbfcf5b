"""Encodings of the standard streams, the same for every command."""

import contextlib
import io
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
