"""An interrupted `generate --prompts` keeps its results, and the same command continues from them."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import dparallel.cli.model
import dparallel.cli.results
from dparallel.cli.main import main

COUNT = 40
NAMES = ("Tom", "Ann", "Sam", "Eva")
PROMPTS = [f"{NAMES[row % 4]} {row % 10} coins" + " buys 2" * (row % 5) + " ?" for row in range(COUNT)]
DIES_AFTER = 13


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "in.jsonl"
    lines = [json.dumps({"id": row, "prompt": prompt}) + "\n" for row, prompt in enumerate(PROMPTS)]
    file.write_text("".join(lines), encoding="utf-8")
    return file


@pytest.fixture
def command(tiny_checkpoint, prompts, tmp_path):
    shape = ["--gen-length", "24", "--block-length", "8", "--threshold", "1.5", "--batch-size", "4"]
    model = ["generate", "--model", str(tiny_checkpoint), "--prompts", str(prompts)]
    return [*model, *shape, "--device", "cpu", "--out", str(tmp_path / "out.jsonl")]


@pytest.fixture
def whole(command, tmp_path) -> bytes:
    """The results of an uninterrupted run."""
    out = tmp_path / "whole.jsonl"
    assert main([*command, "--out", str(out)]) == 0
    return out.read_bytes()


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """The number of prompts of each call of `generate`."""
    calls, real = [], dparallel.cli.model.generate

    def count(model, prompts, *others):
        calls.append(len(prompts))
        return real(model, prompts, *others)

    monkeypatch.setattr(dparallel.cli.model, "generate", count)
    return calls


def die_after(monkeypatch, count: int, die) -> None:
    """Call `die` during the run, after `count` results."""
    real, added = dparallel.cli.results._Partial.add, []

    def add(self, row, result):
        real(self, row, result)
        added.append(row)
        if len(added) == count:
            die()

    monkeypatch.setattr(dparallel.cli.results._Partial, "add", add)


KILLED = f"""
import os, signal, sys
from dparallel.cli import main, results
real, added = results._Partial.add, []
def add(self, row, result):
    if len(added) == {DIES_AFTER}:
        os.write(self.descriptor, b'{{"row": {COUNT - 1}, "resp')  # a line is being written
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, row, result)
    added.append(row)
results._Partial.add = add
sys.exit(main.main(sys.argv[1:]))
"""


def test_a_killed_run_is_continued(command, whole, decoded, tmp_path, capsys):
    ran = subprocess.run([sys.executable, "-c", KILLED, *command], capture_output=True)
    assert ran.returncode == -signal.SIGKILL
    assert not (tmp_path / "out.jsonl").exists()
    assert (tmp_path / "out.jsonl.partial").is_file()
    capsys.readouterr()
    assert main(command) == 0
    assert f"{DIES_AFTER} of {COUNT} results are from an interrupted run" in capsys.readouterr().err
    assert decoded[-1] == COUNT - DIES_AFTER
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    assert not (tmp_path / "out.jsonl.partial").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_say_what_is_kept(command, whole, decoded, tmp_path, capsys, monkeypatch, number, code):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    partial = tmp_path / "out.jsonl.partial"
    try:
        with monkeypatch.context() as patched:
            die_after(patched, DIES_AFTER, lambda: os.kill(os.getpid(), number))
            capsys.readouterr()
            assert main(command) == code
    finally:
        signal.signal(signal.SIGINT, before)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        f"Interrupted; {DIES_AFTER} of {COUNT} results are kept in {partial}; run the same command again to "
        "continue."
    )
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert main(command) == 0
    assert decoded[-1] == COUNT - DIES_AFTER
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_a_run_is_continued_more_than_once_and_its_trace_says_so(
    command, whole, tmp_path, capsys, monkeypatch
):
    for count in (5, 9):
        with monkeypatch.context() as patched:
            die_after(patched, count, lambda: 1 // 0)
            with pytest.raises(ZeroDivisionError) as raised:
                main(command)
    assert raised.value.__notes__[0].startswith(f"14 of {COUNT} results are kept")
    trace = tmp_path / "trace.html"
    assert main([*command, "--trace", str(trace)]) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    page = trace.read_text(encoding="utf-8")
    assert f"14 of {COUNT} results are from an interrupted run" in page
    assert page.count('"commit_step":') == COUNT - 14


def test_a_full_disk_is_one_line_and_loses_nothing(command, whole, decoded, tmp_path, capsys):
    """A limit of the file's size stops a write in the middle of a line, like a full disk."""
    partial = tmp_path / "out.jsonl.partial"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        code = main(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"dparallel generate: error: {partial} cannot be written (File too large; ")
    assert f"of {COUNT} results are kept in {partial}; run the same command again to continue" in last
    kept = partial.read_bytes().count(b"\n") - 1
    assert 0 < kept < COUNT
    assert main(command) == 0
    assert decoded[-1] == COUNT - kept
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_another_command_does_not_mix_with_what_is_kept(command, prompts, tmp_path, capsys, monkeypatch):
    partial = tmp_path / "out.jsonl.partial"
    with monkeypatch.context() as patched:
        die_after(patched, 3, lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            main(command)
    capsys.readouterr()
    kept = partial.read_bytes()
    assert main([*command, "--threshold", "1.2", "--gen-length", "16"]) == 2
    error = capsys.readouterr().err
    assert f"{partial} holds 3 results of a command with another --gen-length, threshold: give that" in error
    prompts.write_text('{"prompt": "Tom ?"}\n', encoding="utf-8")
    assert main(command) == 2
    assert "of a command with another prompts" in capsys.readouterr().err
    assert partial.read_bytes() == kept


def test_what_is_kept_does_not_replace_a_file_made_meanwhile(command, whole, tmp_path, capsys, monkeypatch):
    """All of it does: the run ended between its last two steps."""
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    for count in (3, COUNT):
        with monkeypatch.context() as patched:
            die_after(patched, count if count < COUNT else COUNT - 3, lambda: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                main(command)
        out.write_bytes(b"{}\n")
        capsys.readouterr()
        assert main(command) == (2 if count < COUNT else 0)
        if count < COUNT:
            assert f"--out {out} has content already" in capsys.readouterr().err
            assert out.read_bytes() == b"{}\n"
            out.unlink()
    assert out.read_bytes() == whole
    assert not partial.exists()


@pytest.mark.parametrize(
    "content", [b"[]\n", b"text\n", b"no whole line", b'{"a": 1}\n{"row": "x"}\n', b"\xff\n"]
)
def test_a_foreign_partial_file_is_left_alone(command, tmp_path, capsys, content):
    partial = tmp_path / "out.jsonl.partial"
    partial.write_bytes(content)
    assert main(command) == 2
    assert f"{partial} is damaged, or was not written by this command" in capsys.readouterr().err
    assert partial.read_bytes() == content


def test_a_run_killed_before_its_first_result_starts_anew(command, whole, tmp_path, monkeypatch):
    """While it wrote the line that identifies the command."""
    partial = tmp_path / "out.jsonl.partial"
    for length in (0, 30):
        with monkeypatch.context() as patched:
            die_after(patched, 1, lambda: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                main(command)
        partial.write_bytes(partial.read_bytes()[:length])
        assert main(command) == 0
        assert (tmp_path / "out.jsonl").read_bytes() == whole
        assert not partial.exists()
        (tmp_path / "out.jsonl").unlink()


def test_two_runs_do_not_write_one_file(command, tmp_path, capsys, monkeypatch):
    codes = []

    def second() -> None:
        codes.append(main(command))
        raise ZeroDivisionError

    die_after(monkeypatch, 3, second)
    with pytest.raises(ZeroDivisionError):
        main(command)
    assert codes == [2]
    assert "is being written by another process" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl.partial").read_bytes().count(b"\n") == 4


def test_what_is_refused_leaves_no_file(command, prompts, tmp_path):
    prompts.write_text('{"prompt": "' + "1 " * 50 + '"}\n', encoding="utf-8")
    assert main(command) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_a_pipe_gets_the_lines_in_order_while_more_are_decoded(command, whole, tmp_path, monkeypatch):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    received: list[bytes] = []
    before_the_end: list[bool] = []

    def read() -> None:
        with fifo.open("rb") as stream:
            received.extend(stream)

    real = dparallel.cli.model.generate

    def last(*arguments):
        generations = real(*arguments)
        before_the_end.append(len(received) > 0 or (not reader.join(0.2) and len(received) > 0))
        return generations

    monkeypatch.setattr(dparallel.cli.model, "generate", last)
    reader = threading.Thread(target=read)
    reader.start()
    assert main([*command, "--out", str(fifo)]) == 0
    reader.join()
    assert b"".join(received) == whole
    assert before_the_end == [True]
    assert fifo.is_fifo()
    assert not fifo.with_name("fifo.partial").exists()


def test_a_pipe_whose_reader_leaves_is_one_line(command, tmp_path, capsys):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    def read() -> None:
        fifo.open("rb").close()

    reader = threading.Thread(target=read)
    reader.start()
    code = main([*command, "--out", str(fifo)])
    reader.join()
    last = capsys.readouterr().err.splitlines()[-1]
    assert code == 2
    assert f"error: {fifo}: its reader has left; " in last
