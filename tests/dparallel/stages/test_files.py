"""A written file is complete, follows links, and keeps its owner, mode and kind."""

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dparallel.config.base import UserError
from dparallel.stages import files
from dparallel.stages.files import (
    FileError,
    making,
    naming_the_file,
    remove_all_partials,
    replacing,
    saving_folder,
    sweep,
    write_atomically,
    write_table,
)

ROOT = os.geteuid() == 0
TABLE = pa.table({"number": [1, 2, 3]})


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_text_is_utf_8_and_bytes_are_themselves(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a" / "text", "Réponds\n")
    assert (tmp_path / "a" / "text").read_bytes() == b"R\xc3\xa9ponds\n"
    write_atomically(tmp_path / "a" / "text", b"\r\n\xff")
    assert (tmp_path / "a" / "text").read_bytes() == b"\r\n\xff"
    assert names(tmp_path / "a") == ["text"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_new_file_has_the_umasks_mode(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file", "new")
    finally:
        os.umask(before)
    assert mode(tmp_path / "file") == 0o666 & ~umask


def test_an_existing_file_keeps_its_mode_and_owner(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old", encoding="utf-8")
    owner = (65534, 65534) if ROOT else (os.getuid(), os.getgid())
    os.chown(file, *owner)
    file.chmod(0o664)
    write_atomically(file, "new")
    write_table(tmp_path / "table", TABLE)
    (tmp_path / "table").chmod(0o600)
    write_table(tmp_path / "table", TABLE)
    there = file.stat()
    assert (there.st_uid, there.st_gid, mode(file)) == (*owner, 0o664)
    assert mode(tmp_path / "table") == 0o600
    assert file.read_text(encoding="utf-8") == "new"


def test_a_chain_of_links_stays_and_its_end_is_written(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "file").write_text("old", encoding="utf-8")
    (tmp_path / "middle").symlink_to("far/file")
    (tmp_path / "link").symlink_to(tmp_path / "middle")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "middle").is_symlink()
    assert (tmp_path / "far" / "file").read_text(encoding="utf-8") == "new"
    assert names(tmp_path / "far") == ["file"]


def test_a_dangling_link_makes_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("there/file")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "there" / "file").read_text(encoding="utf-8") == "new"
    assert (tmp_path / "link").is_symlink()


def test_links_in_a_circle_are_named(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(FileError, match=r"/a cannot be written \(Too many levels of symbolic links"):
        write_atomically(tmp_path / "a", "new")
    assert names(tmp_path) == ["a", "b"]


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    write_atomically(pipe, "through")
    reader.join(timeout=10)
    assert received == [b"through"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert names(tmp_path) == ["pipe"]


def make_device(path: Path, minor: int) -> None:
    """A memory device node (3 is null, 7 is full), if permitted."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, minor))
        path.read_bytes() if minor == 3 else None
    except OSError:
        pytest.skip("no device nodes here")


def test_a_device_stays_one(tmp_path: Path) -> None:
    make_device(tmp_path / "null", minor=3)
    (tmp_path / "link").symlink_to("null")
    write_atomically(tmp_path / "link", "gone")
    assert stat.S_ISCHR((tmp_path / "null").stat().st_mode)
    assert names(tmp_path) == ["link", "null"]


def test_a_full_disk_is_named_with_what_was_to_be_written(tmp_path: Path) -> None:
    make_device(tmp_path / "full", minor=7)
    with pytest.raises(
        FileError, match=r"full cannot be written \(No space left .*; 2 MB to write"
    ) as raised:
        write_atomically(tmp_path / "full", "x" * 2_000_000)
    assert len(str(raised.value).splitlines()) == 1
    assert isinstance(raised.value, UserError)
    assert isinstance(raised.value, OSError)


def test_the_standard_output_is_written_to(tmp_path: Path) -> None:
    """To a pipe, and to a file, which keeps text printed before and after."""
    code = (
        "import sys; from dparallel.stages.files import write_atomically; print('before', flush=True); "
        "write_atomically('/dev/stdout', 'middle\\n'); print('after')"
    )
    piped = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=60, check=True
    )
    assert piped.stdout == "before\nmiddle\nafter\n"
    with (tmp_path / "out").open("a", encoding="utf-8") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, timeout=60, check=True)
    assert (tmp_path / "out").read_text(encoding="utf-8") == "before\nmiddle\nafter\n"


LIMITED = """
import resource, signal, sys
import pyarrow as pa
from dparallel.stages.files import FileError, write_atomically, write_table
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
numbers = pa.table({"number": [index * 7919 % 1000003 for index in range(200_000)]})
for write, content in ((write_atomically, "x" * 200_000), (write_table, numbers)):
    try:
        write(sys.argv[1], content)
    except FileError as error:
        print(error)
"""


def test_what_could_not_be_written_whole_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(file)],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith(f"{file} cannot be written (File too large; ")
    assert file.read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["file"]


def test_an_error_of_the_writer_leaves_the_old_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", "old")

    def fail() -> None:
        with replacing(tmp_path / "file") as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (tmp_path / "file").read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(ROOT, reason="root may write anywhere")
def test_a_folder_and_a_file_that_are_read_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old", encoding="utf-8")
    (tmp_path / "file").chmod(0o444)
    with pytest.raises(FileError, match=r"file cannot be written \(Permission denied\)"):
        write_atomically(tmp_path / "file", "new")
    tmp_path.chmod(0o555)
    with pytest.raises(FileError, match=r"other cannot be written \(Permission denied\)"):
        write_atomically(tmp_path / "other", "new")
    tmp_path.chmod(0o755)


def test_a_folder_in_the_place_of_a_file_and_a_file_in_that_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"cannot be written \(Is a directory\)"):
        write_atomically(tmp_path, "new")
    (tmp_path / "file").write_text("old", encoding="utf-8")
    with pytest.raises(FileError, match=r"file/inner cannot be written"):
        write_atomically(tmp_path / "file" / "inner", "new")


def test_a_table_that_is_there_stays_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    write_table(tmp_path / "table", TABLE)
    write_table(tmp_path / "table", TABLE.slice(1), replace=False)
    assert pq.read_table(tmp_path / "table") == TABLE
    write_table(tmp_path / "table", TABLE.slice(1))
    assert pq.read_table(tmp_path / "table") == TABLE.slice(1)
    assert names(tmp_path) == ["table"]


def test_errors_of_other_libraries_writers_are_named(tmp_path: Path) -> None:
    """Errors of torch, whose writer reports no cause."""

    def save() -> None:
        with naming_the_file(tmp_path / "state"):
            raise RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0")

    with pytest.raises(FileError, match=r"state cannot be written \(No space left on device; .* MB free"):
        save()
    with pytest.raises(RuntimeError, match="not of a disk"), naming_the_file(tmp_path / "state"):
        raise RuntimeError("not of a disk")


def test_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    """A file that is being written is locked by its writer, and kept."""
    left = tmp_path / "inner" / ".part-00000.parquet.12ab.partial"
    left.parent.mkdir()
    left.write_bytes(b"half")
    (tmp_path / "out.jsonl.partial").write_bytes(b"results of `dparallel generate` that it goes on from")
    saving = tmp_path / ".saving-x"
    saving.mkdir()
    with replacing(tmp_path / "inner" / "whole") as file:
        sweep(tmp_path)
        file.write(b"whole")
    assert names(tmp_path / "inner") == ["whole"]
    assert names(tmp_path) == [".saving-x", "inner", "out.jsonl.partial"]
    sweep(tmp_path, alone=True)
    assert names(tmp_path) == ["inner", "out.jsonl.partial"]


def test_a_writer_that_is_killed_loses_its_lock(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom dparallel.stages.files import replacing\n"
        "with replacing(sys.argv[1]) as file:\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], check=False)
    assert len(names(tmp_path)) == 1
    sweep(tmp_path)
    assert names(tmp_path) == []


HARD_END = """
import os, sys, threading
from pathlib import Path
from dparallel.stages.files import making, remove_all_partials, replacing, saving_folder
folder, inside = Path(sys.argv[1]), threading.Barrier(4)
def make():
    with making(folder / "part-00001.parquet"):
        inside.wait()
        threading.Event().wait()
def write():
    with replacing(folder / "whole") as file:
        file.write(b"half")
        inside.wait()
        threading.Event().wait()
def save():
    with saving_folder(folder) as partial:
        (partial / "weights").write_bytes(b"half")
        inside.wait()
        threading.Event().wait()
for work in (make, write, save):
    threading.Thread(target=work, daemon=True).start()
inside.wait()
print(*sorted(path.name.rpartition(".")[2][:7] for path in folder.iterdir()), flush=True)
remove_all_partials()
os._exit(3)
"""


def test_a_process_that_ends_at_once_removes_what_its_threads_are_writing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HARD_END, str(tmp_path)]
    ended = subprocess.run(
        command, capture_output=True, encoding="utf-8", cwd=Path(__file__).parents[3], check=False
    )
    assert (ended.returncode, ended.stdout.split()) == (3, ["partial", "partial", "saving-"]), ended.stderr
    assert names(tmp_path) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_at_any_instruction_leaves_no_temporary_file(tmp_path: Path) -> None:
    """Ctrl-C raises wherever the interpreter is, also between the making of a file and its registration."""

    def make() -> None:
        with making(tmp_path / "part"):
            pass

    def write() -> None:
        write_atomically(tmp_path / "whole", b"content")
        (tmp_path / "whole").unlink()

    def save() -> None:
        with saving_folder(tmp_path) as partial:
            (partial / "weights").write_bytes(b"half")

    for work in (make, write, save):
        interrupted, at = True, 0
        while interrupted:
            at += 1
            interrupted = _interrupted(work, at)
            remove_all_partials()  # as at the end of an interrupted program
            assert [name for name in names(tmp_path) if name != "whole"] == [], f"instruction {at}"
        assert at > 20


def _interrupted(work: Callable[[], None], at: int) -> bool:
    """Run with an interruption at an instruction in the module of files; False if it ends before that."""
    left = at

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename != files.__file__ or frame.f_code.co_name.startswith("remove"):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return left <= 0
