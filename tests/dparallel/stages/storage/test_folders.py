"""What is pushed is pulled again, and an interruption at any moment leaves nothing half-trusted."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dparallel.stages.files import write_atomically
from dparallel.stages.generation_file import EMPTY, GENERATION, with_defaults
from dparallel.stages.manifest import CLAIM, MANIFEST, FileRecord, digest, file_digest, verify
from dparallel.stages.metrics_log import METRICS
from dparallel.stages.storage.folders import Storage
from dparallel.stages.storage.remote import Remote, StorageError
from tests.dparallel.stages.storage.conftest import NewStorage, content_of, finish

STAGE = "small/training-0123456789"
FILES = {"adapter/model.safetensors": b"weights" * 9, "adapter/config.json": b"{}"}
WRITES = ("_create", "_remove", "_upload", "_write")  # of a store


class Killed(BaseException):
    """The process is killed."""


def at(storage: Storage, name: str = STAGE) -> Path:
    return storage.runs / name


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=5)
@given(
    st.dictionaries(st.sampled_from(["a", "b.json", "c/d", "c/e.bin"]), st.binary(max_size=50), min_size=1)
)
def test_what_is_pushed_is_pulled(new_storage: NewStorage, files: dict[str, bytes]) -> None:
    here, there = new_storage("here"), new_storage("there")
    name = f"small/training-{digest({file: content.hex() for file, content in files.items()})[:10]}"
    made = finish(at(here, name), files)
    here.push(at(here, name))
    assert there.manifest(at(there, name)) == made
    assert not at(there, name).exists(), "planning reads a manifest and makes nothing"
    assert there.pull(at(there, name)) == made
    assert content_of(at(there, name)) == content_of(at(here, name))
    assert verify(at(there, name)).fingerprint == made.fingerprint


def test_nothing_is_pulled_of_what_is_not_finished(new_storage: NewStorage) -> None:
    here = new_storage("here")
    assert here.pull(at(here)) is None
    assert not at(here).exists()


def writes_of(storage: Storage, act: Any, killed_at: int | None = None) -> int:
    """Number of writes that `act` sends to a store; it is killed after so many, before the next one."""
    count = 0

    def counted(method: Any) -> Any:
        def write(*arguments: Any) -> Any:
            nonlocal count
            if count == killed_at:
                raise Killed
            count += 1
            return method(*arguments)

        return write

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dparallel.stages.storage.folders.TOGETHER", 1)
        for name in WRITES:
            patch.setattr(storage.remote, name, counted(getattr(storage.remote, name)))
        act()
    return count


@pytest.mark.parametrize("by", ["the same machine", "another machine"])
def test_a_push_that_is_killed_leaves_nothing_trusted_and_is_repeated(
    new_storage: NewStorage, by: str
) -> None:
    storage = new_storage("first")
    whole = writes_of(storage, lambda: push_new(storage, f"{STAGE}whole"))
    assert whole == len(FILES) + 2, "the files, stage.json, and the manifest"
    for killed_at in range(whole):
        name = f"{STAGE}{killed_at}"
        first, second = new_storage("first"), new_storage("second")
        finish(at(first, name), FILES)
        with pytest.raises(Killed):
            writes_of(first, partial(first.push, at(first, name)), killed_at)
        assert second.pull(at(second, name)) is None, f"after {killed_at} writes, nothing is trusted"
        if by == "the same machine":
            left = writes_of(first, partial(first.push, at(first, name)))
            assert left == whole - killed_at, "only what is missing is sent"
        else:
            write_atomically(at(second, name) / "adapter/model.safetensors", b"other w" * 9)
            finish(at(second, name), {**FILES, "adapter/model.safetensors": b"other w" * 9})
            second.push(at(second, name))
        third = new_storage("third")
        assert third.pull(at(third, name)) is not None
        verify(at(third, name))


def push_new(storage: Storage, name: str) -> None:
    finish(at(storage, name), FILES)
    storage.push(at(storage, name))


@pytest.mark.parametrize("moment", range(4))
def test_a_pull_that_is_killed_leaves_nothing_trusted_and_is_repeated(
    new_storage: NewStorage, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = new_storage("here"), new_storage("there")
    push_new(here, STAGE)
    count = 0

    def download(name: str, file: Path) -> bool:
        nonlocal count
        if count == moment:
            file.write_bytes(b"half")
            raise Killed
        count += 1
        return Remote.download(there.remote, name, file)

    monkeypatch.setattr("dparallel.stages.storage.folders.TOGETHER", 1)
    with monkeypatch.context() as patch:
        patch.setattr(there.remote, "download", download)
        with pytest.raises(Killed):
            there.pull(at(there))
        assert not (at(there) / MANIFEST).exists()
    assert there.pull(at(there)) is not None
    assert content_of(at(there)) == content_of(at(here))


def test_equal_content_of_two_is_one_and_other_content_is_an_error(new_storage: NewStorage) -> None:
    first, second, third = (new_storage(machine) for machine in ("first", "second", "third"))
    push_new(first, STAGE)
    finish(at(second), FILES, seconds=7.0)
    assert writes_of(second, lambda: second.push(at(second))) == 0
    finish(at(third), {**FILES, "adapter/config.json": b"[]"})
    for act in (third.push, third.pull):
        with pytest.raises(StorageError, match=f"{STAGE} is finished with another content than .*: move"):
            act(at(third))
    assert first.pull(at(first)) is not None


def test_a_stage_that_was_opened_again_replaces_its_result(new_storage: NewStorage) -> None:
    here, there = new_storage("here"), new_storage("there")
    push_new(here, STAGE)
    before = there.pull(at(there))
    finish(at(there), {**FILES, "adapter/config.json": b"[1]"})
    there.push(at(there), replaces=before)
    third = new_storage("third")
    third.pull(at(third))
    assert (at(third) / "adapter/config.json").read_bytes() == b"[1]"


@pytest.mark.parametrize("damage", ["other bytes", "missing"])
def test_damage_in_the_store_is_named_and_nothing_is_trusted(new_storage: NewStorage, damage: str) -> None:
    here, there = new_storage("here"), new_storage("there")
    push_new(here, STAGE)
    name = f"{STAGE}/adapter/model.safetensors"
    if damage == "missing":
        here.remote.remove([name])
    else:
        here.remote.write(name, b"weighty" * 9)
    with pytest.raises(StorageError, match="adapter/model.safetensors (is missing|does not match)"):
        there.pull(at(there))
    assert not (at(there) / MANIFEST).exists()


def test_a_damaged_manifest_of_the_store_is_named(new_storage: NewStorage) -> None:
    here = new_storage("here")
    here.remote.write(f"{STAGE}/{MANIFEST}", b'{"stage": ')
    with pytest.raises(StorageError, match=f"{STAGE}/{MANIFEST} is damaged .*: delete it"):
        here.manifest(at(here))


def test_a_file_that_was_damaged_here_is_pulled_again(new_storage: NewStorage) -> None:
    here = new_storage("here")
    push_new(here, STAGE)
    (at(here) / "adapter/model.safetensors").unlink()
    here.pull(at(here))
    verify(at(here))


@pytest.mark.parametrize("listed", [True, False])
def test_decode_defaults_of_a_merged_model_travel_and_are_kept(listed: bool, new_storage: NewStorage) -> None:
    """They are chosen after the stage was finished and pushed, and its manifest stays as it was."""
    here, there = new_storage("here"), new_storage("there")
    plain = with_defaults(b'{"eos_token_id": 2}', None) if listed else EMPTY
    made = finish(at(here), {**FILES, **({GENERATION: plain} if listed else {})})
    here.push(at(here))
    chosen = with_defaults(plain, {"decoding": {"threshold": 0.3}})
    write_atomically(at(here) / GENERATION, chosen)
    assert here.pull(at(here)) == made
    assert (at(here) / GENERATION).read_bytes() == chosen
    here.push_files(at(here), [GENERATION], {})
    assert there.pull(at(there)) == made
    assert (at(there) / GENERATION).read_bytes() == chosen
    verify(at(there))


def test_what_does_not_fit_on_the_disk_is_refused_before_it_is_pulled(
    new_storage: NewStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = new_storage("here"), new_storage("there")
    push_new(here, STAGE)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match="needs .* GB are free on its disk: make room"):
        there.pull(at(there))


# Unfinished stages


def checkpoint(folder: Path, train_step: int, state: bytes) -> None:
    tag = folder / "checkpoints" / f"step-{train_step:08d}"
    write_atomically(tag / "state.safetensors", state)
    record = FileRecord(bytes=len(state), sha256=file_digest(tag / "state.safetensors"))
    made = {"train_step": train_step, "files": {"state.safetensors": record.model_dump()}}
    write_atomically(tag / "checkpoint.json", json.dumps(made))


def train(folder: Path, *train_steps: int) -> None:
    """Make the files of a training that was interrupted after the last of these checkpoints."""
    write_atomically(folder / CLAIM, "{}")
    for train_step in train_steps:
        checkpoint(folder, train_step, b"s" * train_step)
    lines = [json.dumps({"train_step": step + 1}) for step in range(train_steps[-1])]
    write_atomically(folder / METRICS, "\n".join(lines) + "\n")


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(file.parent.name[5:]) for file in folder.glob("checkpoints/*/checkpoint.json"))


def test_a_training_goes_on_elsewhere_from_its_last_checkpoint(new_storage: NewStorage) -> None:
    here, there = new_storage("here"), new_storage("there")
    train(at(here), 10, 20)
    here.push_unfinished(at(here))
    shutil.rmtree(at(here) / "checkpoints/step-00000010")
    train(at(here), 30)
    here.push_unfinished(at(here))
    names = [name for name in here.remote.sizes(STAGE) if "step-00000010" in name]
    assert names == [], "checkpoints that are gone here are gone there"
    train(at(there), 10)  # this machine had begun earlier
    there.pull_unfinished(at(there))
    assert checkpoints(at(there)) == [10, 20, 30]
    assert len((at(there) / METRICS).read_text(encoding="utf-8").splitlines()) == 30
    train(at(there), 40)
    there.pull_unfinished(at(there))
    assert len((at(there) / METRICS).read_text(encoding="utf-8").splitlines()) == 40, "later here: kept"


def test_a_checkpoint_counts_when_it_is_whole_in_the_store(new_storage: NewStorage) -> None:
    storage = new_storage("any")
    whole = writes_of(storage, lambda: push_training(storage, f"{STAGE}whole"))
    for killed_at in range(whole):
        here, there, name = new_storage("here"), new_storage("there"), f"{STAGE}{killed_at}"
        train(at(here, name), 10, 20)
        push = partial(here.push_unfinished, at(here, name))
        with pytest.raises(Killed):
            writes_of(here, push, killed_at)
        there.pull_unfinished(at(there, name))
        for train_step in checkpoints(at(there, name)):
            state = at(there, name) / f"checkpoints/step-{train_step:08d}/state.safetensors"
            assert state.read_bytes() == b"s" * train_step
            assert len((at(there, name) / METRICS).read_text(encoding="utf-8").splitlines()) >= train_step


def push_training(storage: Storage, name: str) -> None:
    train(at(storage, name), 10, 20)
    storage.push_unfinished(at(storage, name))


def test_a_finished_training_leaves_no_checkpoint_in_the_store(new_storage: NewStorage) -> None:
    here, there = new_storage("here"), new_storage("there")
    push_training(here, STAGE)
    push_new(here, STAGE)
    there.pull(at(there))
    assert not (at(there) / "checkpoints").exists()
    assert len((at(there) / METRICS).read_text(encoding="utf-8").splitlines()) == 20
    assert checkpoints(at(here)) == [10, 20]
    assert not [name for name in here.remote.sizes(STAGE) if name.startswith("checkpoints")]


def test_the_first_shard_of_several_machines_is_kept(new_storage: NewStorage) -> None:
    first, second = new_storage("first"), new_storage("second")
    for storage, content in ((first, b"first"), (second, b"second")):
        write_atomically(at(storage) / CLAIM, "{}")
        write_atomically(at(storage) / "part-00000.parquet", content)
        storage.push_unfinished(at(storage))
    write_atomically(at(second) / "part-00001.parquet", b"1")
    second.push_unfinished(at(second))
    first.pull_unfinished(at(first))
    assert content_of(at(first)) == content_of(at(second))
    assert (at(second) / "part-00000.parquet").read_bytes() == b"first"


# Measurements


def test_measurements_of_other_machines_are_brought_once_and_again_when_asked(
    new_storage: NewStorage,
) -> None:
    here, there = new_storage("here"), new_storage("there")
    key = Path("measurements/samples/0123")
    assert not list((here.runs / key).glob("*"))
    here.bring(here.runs / key)
    write_atomically(there.runs / key / "00000-00010.parquet", b"theirs")
    there.share(there.runs / key / "00000-00010.parquet")
    here.bring(here.runs / key)
    assert not (here.runs / key).exists()
    here.bring_again()
    assert (here.runs / key / "00000-00010.parquet").read_bytes() == b"theirs"
    write_atomically(here.runs / key / "00010-00020.parquet", b"mine")
    here.share(here.runs / key / "00010-00020.parquet")
    write_atomically(there.runs / key / "00010-00020.parquet", b"late")
    there.share(there.runs / key / "00010-00020.parquet")
    assert (there.runs / key / "00010-00020.parquet").read_bytes() == b"mine", "the first one is kept"


def test_no_file_is_written_outside_of_a_stage(new_storage: NewStorage) -> None:
    here, there = new_storage("here"), new_storage("there")
    made = finish(at(here), FILES)
    outside = made.model_copy(update={"files": {"../../outside": made.files["adapter/config.json"]}})
    here.remote.write("small/outside", b"{}")
    here.remote.write(f"{STAGE}/{MANIFEST}", outside.model_dump_json().encode())
    with pytest.raises(StorageError, match="lists '../../outside', outside of it"):
        there.pull(at(there))
