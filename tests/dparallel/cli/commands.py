"""Commands of these tests: a prompt and lengths for the tiny checkpoint, files, and errors of one line."""

from pathlib import Path

import pytest

from dparallel.cli.main import main

PROMPT = "Tom 7 coins buys 2 loses 1 finds 1 . . ?"
SHAPE = ["--gen-length", "24", "--block-length", "8", "--threshold", "1.5"]


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def refused(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """The line on stderr of a command that ends with exit code 2 and prints nothing to stdout."""
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = ended.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    return err
