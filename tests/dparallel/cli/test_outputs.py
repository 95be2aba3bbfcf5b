"""Results are written through links, pipes and devices, and to files that keep their mode."""

import os
import stat
import threading
from pathlib import Path

import pytest

from dparallel.cli.main import main
from dparallel.cli.outputs import check_different, check_writable
from dparallel.config.base import ConfigError


def test_what_cannot_be_written_is_refused_first(tmp_path):
    with pytest.raises(ConfigError, match="is a folder; name a file in it"):
        check_writable("--out", tmp_path)
    with pytest.raises(ConfigError, match=r"none cannot be written to \(No such file"):
        check_writable("--trace", tmp_path / "none" / "file")
    (tmp_path / "dangling").symlink_to(tmp_path / "none" / "file")
    with pytest.raises(ConfigError, match=r"none cannot be written to \(No such file"):
        check_writable("--trace", tmp_path / "dangling")
    assert not list(tmp_path.glob("none"))
    (tmp_path / "one").symlink_to("other")
    (tmp_path / "other").symlink_to("one")
    with pytest.raises(ConfigError, match="one cannot be written to .*symbolic links"):
        check_writable("--out", tmp_path / "one")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="inside cannot be written to .*Not a directory"):
        check_writable("--out", tmp_path / "file" / "inside")
    with pytest.raises(ConfigError, match="cannot be written to .*too long"):
        check_writable("--out", tmp_path / ("a" * 300))


def test_pipes_devices_and_open_files_can_be_written(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/null")
    for path in (tmp_path / "fifo", tmp_path / "link", "/dev/null", "/dev/stdout", "/dev/fd/1", "/dev/full"):
        check_writable("--out", Path(path))


PROMPTS = '{"prompt": "Tom 7 ?"}\n{"prompt": "Ann 2 buys 3 ?"}\n'
SHAPE = ["--gen-length", "8", "--block-length", "8"]


@pytest.fixture
def command(tiny_checkpoint, tmp_path):
    (tmp_path / "in.jsonl").write_text(PROMPTS, encoding="utf-8")
    return ["generate", "--model", str(tiny_checkpoint), *SHAPE, "--prompts", str(tmp_path / "in.jsonl")]


def test_full_devices_are_one_line(command, capsys, monkeypatch):
    for flag in ("--out", "--trace"):
        assert main([*command, flag, "/dev/full"]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(
            "dparallel generate: error: /dev/full cannot be written (No space left on device"
        )
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert main(command) == 2
        monkeypatch.undo()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("dparallel generate: error: stdout: No space left on device; 0 of 2 results")


@pytest.fixture
def printed(command, capsys) -> str:
    assert main(command) == 0
    return capsys.readouterr().out


def test_a_finished_file_is_not_replaced(command, printed, tmp_path, capsys):
    """Neither by other prompts or settings nor by the same; a replay, which is made again at once, is."""
    out, trace = tmp_path / "out.jsonl", tmp_path / "trace.html"
    files = ["--out", str(out), "--trace", str(trace)]
    assert main([*command, *files]) == 0
    assert f"Replay of the decoding: {trace}\n" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(out)
    for taken in (out, tmp_path / "link"):
        for more in ([], ["--threshold", "0.1"], ["--model", "nothing/here"]):
            assert main([*command, *more, "--out", str(taken)]) == 2
            assert f"--out {taken} has content already, which would be replaced: delete it, or name " in (
                capsys.readouterr().err
            )
    assert out.read_text(encoding="utf-8") == printed
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_links_are_followed(command, printed, tmp_path):
    for name in ("out", "trace"):
        (tmp_path / name).symlink_to(tmp_path / f"{name}.real")
    (tmp_path / "out.real").touch()
    assert main([*command, "--out", str(tmp_path / "out"), "--trace", str(tmp_path / "trace")]) == 0
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "trace").is_symlink()
    assert (tmp_path / "out.real").read_text(encoding="utf-8") == printed
    assert "<title>" in (tmp_path / "trace.real").read_text(encoding="utf-8")
    assert len(list(tmp_path.iterdir())) == 5, "nothing else is left"


def test_files_keep_mode_and_owner(command, printed, tmp_path):
    owner = (65534, 65534) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    for name in ("out", "trace"):
        (tmp_path / name).touch()
        os.chown(tmp_path / name, *owner)
        (tmp_path / name).chmod(0o664)
    assert main([*command, "--out", str(tmp_path / "out"), "--trace", str(tmp_path / "trace")]) == 0
    for name in ("out", "trace"):
        found = (tmp_path / name).stat()
        assert stat.S_IMODE(found.st_mode) == 0o664
        assert (found.st_uid, found.st_gid) == owner
    assert (tmp_path / "out").read_text(encoding="utf-8") == printed


def test_devices_stay_devices(command, tmp_path, capfd):
    assert main([*command, "--out", "/dev/null", "--trace", "/dev/null"]) == 0
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    capfd.readouterr()
    assert main([*command, "--out", "/dev/stdout"]) == 0
    with_device = capfd.readouterr().out
    assert main(command) == 0
    assert with_device == capfd.readouterr().out


def test_a_pipe_gets_the_trace(command, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    received = []
    reader = threading.Thread(target=lambda: received.append(fifo.read_text(encoding="utf-8")))
    reader.start()
    assert main([*command, "--trace", str(fifo)]) == 0
    reader.join()
    assert "<title>" in received[0]
    assert fifo.is_fifo()


def test_a_name_that_no_file_can_have_is_refused_first(tmp_path):
    for flag in ("--out", "--trace"):
        with pytest.raises(ConfigError, match=rf"{flag} .*cannot be written to \(File name too long\)"):
            check_writable(flag, tmp_path / ("x" * 300))


def test_the_longest_names_can_be_written(command, tmp_path):
    out, trace = tmp_path / ("x" * 247), tmp_path / ("é" * 127)
    assert main([*command, "--out", str(out), "--trace", str(trace)]) == 0
    assert out.is_file()
    assert trace.is_file()


def test_the_trace_does_not_replace_the_results(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "out.jsonl")
    for trace in ("out.jsonl", "link"):
        with pytest.raises(ConfigError, match="are the same file; name two files"):
            check_different(tmp_path / "out.jsonl", tmp_path / trace)
    check_different(tmp_path / "out.jsonl", tmp_path / "page.html")
    check_different(Path("/dev/null"), Path("/dev/null"))
