"""A disk that is full, and one that takes nothing, in the place of the folder of runs."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.failures.conftest import Place
from tests.failures.experiment import LOST, STAGES, copy_before, temporary_files
from tests.failures.table import Row

MEGABYTES = 16


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, encoding="utf-8")
    if done.returncode != 0:
        pytest.skip(f"file systems cannot be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(place: Place) -> Iterator[Path]:
    """A disk of some MB as the folder of runs."""
    place.runs.mkdir()
    mount("-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", str(place.runs))
    yield place.runs
    subprocess.run(["umount", "--lazy", str(place.runs)], check=True)


def finished_before(place: Place, reference: Path, stage: str) -> None:
    copy_before(reference / "runs", place.folder / "copy", stage)
    shutil.copytree(place.folder / "copy", place.runs, dirs_exist_ok=True)


def fill(disk: Path) -> Path:
    """A file that takes all room that is left."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue
    return ballast


@pytest.mark.parametrize("stage", STAGES)
def test_the_disk_is_full_during_a_stage(
    place: Place, disk: Path, reference: Path, shown: Callable[[Row], None], stage: str
) -> None:
    finished_before(place, reference, stage)
    with place.start(stage) as run:
        place.wait_for_the_middle(run, stage)
        ballast = fill(disk)
        code, said = run.code(), run.said
        assert run.leaves_no_process()
    assert code == 1, said
    assert "cannot be written (No space left on device; " in run.last, said
    assert "make room there and run the same again" in run.last
    assert f"{disk}/" in run.last
    assert "Traceback" not in said
    assert temporary_files(disk) == []
    ballast.unlink()
    place.same_again(stage)
    shown(Row("disk full", stage, "exit code 1, one line with the file, nothing half-written", LOST[stage]))


@pytest.mark.parametrize("stage", STAGES)
def test_the_disk_cannot_be_written(
    place: Place, disk: Path, reference: Path, shown: Callable[[Row], None], stage: str
) -> None:
    finished_before(place, reference, stage)
    mount("-o", "remount,ro", str(disk))
    with place.start(stage) as run:
        code, said = run.code(), run.said
        assert run.leaves_no_process()
    assert code == 2, said
    assert said.startswith("error: "), said
    assert said.count("\n") == 1
    assert f"{disk} cannot be written to (Read-only file system" in said
    mount("-o", "remount,rw", str(disk))
    place.same_again(stage)
    shown(
        Row("read-only folder of runs", stage, "refused in one line with the folder, before anything starts")
    )


def test_too_small_a_disk_is_refused(place: Place, shown: Callable[[Row], None]) -> None:
    place.runs.mkdir()
    mount("-t", "tmpfs", "-o", "size=500k", "tmpfs", str(place.runs))
    try:
        with place.start("distill") as run:
            assert run.code() == 2, run.said
            said = run.said
    finally:
        subprocess.run(["umount", "--lazy", str(place.runs)], check=True)
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert f"{place.runs} needs another " in said
    assert "are free: free some" in said
    place.same_again("trajectories")
    shown(Row("too small a disk", "all", "refused in one line with what is needed, before anything starts"))
