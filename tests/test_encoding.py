"""Text files and pipes are UTF-8 in any locale: every call that opens one states the encoding."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Positions of the arguments mode and encoding.
FUNCTIONS = {"open": (1, 3), "fdopen": (1, 3)}
METHODS = {"open": (0, 2), "read_text": (None, 0), "write_text": (None, 1)}
TEMPORARY = {"TemporaryFile": (0, 2), "NamedTemporaryFile": (0, 2)}  # their default mode is binary
PROCESSES = {"run", "Popen", "check_output", "check_call", "call"}


def unencoded(tree: ast.AST) -> Iterator[int]:
    """Line numbers of calls whose text encoding depends on the locale."""
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and _leaves_encoding_open(call):
            yield call.lineno


def _leaves_encoding_open(call: ast.Call) -> bool:
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in keywords or None in keywords:  # None: **arguments, which are not analysed
        return False
    module, name = _called(call.func)
    if module == "subprocess" and name in PROCESSES:
        return any(_is_true(keywords.get(word)) for word in ("text", "universal_newlines"))
    if module == "os" and name == "open":
        return False
    places = TEMPORARY.get(name) or (METHODS if module not in (None, "os", "io") else FUNCTIONS).get(name)
    if places is None:
        return False
    mode_place, encoding_place = places
    if len(call.args) > encoding_place:
        return False
    mode = keywords.get("mode")
    if mode is None and mode_place is not None and len(call.args) > mode_place:
        mode = call.args[mode_place]
    if isinstance(mode, ast.Constant):
        return "b" not in str(mode.value)
    return mode is not None or name not in TEMPORARY


def _called(function: ast.expr) -> tuple[str | None, str]:
    """`subprocess.run` as ("subprocess", "run"), `open` as (None, "open"), `a.b.open` as ("", "open")."""
    if isinstance(function, ast.Attribute):
        return (function.value.id if isinstance(function.value, ast.Name) else "", function.attr)
    return None, function.id if isinstance(function, ast.Name) else ""


def _is_true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


@pytest.mark.parametrize(
    "code",
    [
        "open(path)",
        "open(path, 'w')",
        "open(path, mode='a')",
        "path.open()",
        "path.open('a')",
        "path.parent.open(mode)",
        "os.fdopen(descriptor, 'w')",
        "path.read_text()",
        "(folder / 'a').write_text(text)",
        "subprocess.run(command, text=True)",
        "subprocess.Popen(command, universal_newlines=True, errors='replace')",
        "NamedTemporaryFile('w')",
    ],
)
def test_calls_in_the_locales_encoding_are_found(code: str) -> None:
    assert list(unencoded(ast.parse(code))) == [1]


@pytest.mark.parametrize(
    "code",
    [
        "open(path, 'rb')",
        "open(path, encoding='utf-8')",
        "path.open('wb')",
        "os.open(path, os.O_RDONLY)",
        "os.fdopen(descriptor, 'rb')",
        "path.read_text('utf-8')",
        "path.read_bytes()",
        "path.write_text(text, encoding='utf-8')",
        "subprocess.run(command)",
        "subprocess.run(command, text=True, encoding='utf-8')",
        "TemporaryFile(dir=folder)",
    ],
)
def test_other_calls_are_not(code: str) -> None:
    assert not list(unencoded(ast.parse(code)))


PRINTING = """
import sys
import flows.command

flows.command.Flow = lambda function, *names: function  # without Prefect's server
class Printed:
    name, description, version, flow_run_name = "printed", "", None, None
    def fn(config: str, overrides: list[str] | None = None) -> str: ...
sys.argv = ["printed", "--config", "small.yaml"]
flows.command.main(Printed, lambda **parameters: None, lambda planned, **parameters: "\u2020 \u00b1")
"""


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_flow_prints_its_table_in_any_locale(encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    ended = subprocess.run([sys.executable, "-c", PRINTING], env=environment, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.decode() == "\u2020 \u00b1\n"


RESTARTED = """
import os, sys
from dparallel.stages.streams import restart_in_utf8_mode

restart_in_utf8_mode("program")
print(sys.flags.utf8_mode, open(sys.argv[0]).encoding, os.environ["PYTHONUTF8"], ascii(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_flow_restarts_in_utf8_mode_where_the_locale_has_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(RESTARTED, encoding="utf-8")
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = {**plain, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}

    def printed(*start: str) -> str:
        ended = subprocess.run(
            [sys.executable, *start, "a=1", "\u2020"], env=environment, capture_output=True
        )
        return (ended.stdout + ended.stderr).decode()

    assert printed("-m", "program") == "1 utf-8 1 ['a=1', '\\u2020']\n"
    assert printed(str(tmp_path / "program.py")).startswith("0 "), "started by another program"


def test_every_command_sets_its_encodings() -> None:
    shared = ("from flows.command import main", "from dparallel.cli.main import main")
    commands = 0
    for folder in ("dparallel", "flows", "tasks", "benchmarks"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            prints = file.name != "worker.py"
            if '\nif __name__ == "__main__":\n' in text and prints:
                commands += 1
                assert "    set_encodings()\n" in text or any(each in text for each in shared), file
    assert commands > 10


def test_a_stream_that_was_read_from_keeps_its_encoding() -> None:
    code = "import sys; sys.stdin.readline(); from dparallel.stages import streams; streams.set_encodings()"
    done = subprocess.run([sys.executable, "-c", code], input=b"read\nmore\n", capture_output=True)
    assert done.returncode == 0, done.stderr
