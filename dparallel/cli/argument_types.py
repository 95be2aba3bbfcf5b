"""Types of arguments: they convert the text of a command line, or name what is wrong."""

import argparse
import os
from pathlib import Path

from dparallel.config.paths import is_url


def as_text(argument: str) -> str:
    """An argument as text: bytes that the locale cannot decode (for example `LC_ALL=C`) are read as UTF-8."""
    try:
        argument.encode()
    except UnicodeEncodeError:  # Python represents such bytes as surrogates
        try:
            return os.fsencode(argument).decode()
        except UnicodeError:  # not UTF-8 either; rejected where it is used
            return argument
    return argument


def as_stop(argument: str) -> str:
    """A text that ends responses, which is not empty."""
    if not argument:
        raise argparse.ArgumentTypeError("an empty text would end every response: drop it")
    return as_text(argument)


def as_path(argument: str) -> Path:
    """A path; expands `~`, since shells expand it only at the start of a word, not in `--out=~/file`."""
    return Path(os.path.expanduser(argument))


def as_runs(argument: str) -> Path:
    """The folder of runs of this machine."""
    if is_url(argument):
        raise argparse.ArgumentTypeError(
            f"{argument.rpartition('@')[2]} is a URL: give the folder of runs of this machine, of which a "
            "store holds copies"
        )
    return as_path(argument)


def as_positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least 1")
    return int(text)


def as_port(text: str) -> int:
    """A port, 0 to 65535."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: give a port, 1 to 65535, or 0 for a free one")
    return int(text)
