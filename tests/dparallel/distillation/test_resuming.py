"""The checkpoint from which training resumes: the newest intact one."""

import json
import shutil
from pathlib import Path

import pytest

from dparallel.distillation import resuming
from dparallel.stages.manifest import StageError


def save(folder: Path, train_step: int) -> Path:
    """A checkpoint with a state of a few bytes."""
    resuming.begin(folder).write_bytes(b"state %d" % train_step)
    resuming.keep(folder, train_step, "float32")
    return folder / resuming.step_tag(train_step)


def steps(folder: Path) -> list[int]:
    return sorted(int(tag.name.removeprefix("step-")) for tag in folder.glob("step-*"))


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    assert resuming.newest_whole(tmp_path) is None
    for train_step in (5, 10, 15):
        save(tmp_path, train_step)
    assert steps(tmp_path) == [10, 15]
    found = resuming.newest_whole(tmp_path)
    assert found is not None
    assert (found.train_step, found.tag) == (15, "step-00000015")
    assert found.files.keys() == {resuming.STATE}
    assert (tmp_path / found.state_file).read_bytes() == b"state 15"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-2])


def flip(file: Path) -> None:
    file.write_bytes(b"S" + file.read_bytes()[1:])


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES = {
    "cut": lambda tag: cut(tag / resuming.STATE),
    "empty": lambda tag: (tag / resuming.STATE).write_bytes(b""),
    "changed": lambda tag: flip(tag / resuming.STATE),
    "missing": lambda tag: (tag / resuming.STATE).unlink(),
    "description empty": lambda tag: (tag / resuming.DESCRIPTION).write_bytes(b""),
    "description cut": lambda tag: cut(tag / resuming.DESCRIPTION),
    "description missing": lambda tag: (tag / resuming.DESCRIPTION).unlink(),
    "description a folder": lambda tag: replace_by_folder(tag / resuming.DESCRIPTION),
    "another one's": lambda tag: shutil.copytree(tag.with_name("step-00000005"), tag, dirs_exist_ok=True),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_from_a_damaged_one_it_goes_back_to_the_older_and_says_why(tmp_path: Path, damage, caplog) -> None:
    save(tmp_path, 5)
    newest = save(tmp_path, 10)
    damage(newest)
    found = resuming.newest_whole(tmp_path)
    assert found is not None
    assert found.train_step == 5
    assert str(newest) in caplog.text
    assert "going on from train step 5" in caplog.text
    assert steps(tmp_path) == [5, 10]  # nothing is deleted before there is a newer one
    save(tmp_path, 7)
    assert steps(tmp_path) == [5, 7]


def test_a_missing_one_is_not_missed(tmp_path: Path) -> None:
    save(tmp_path, 5)
    shutil.rmtree(save(tmp_path, 10))
    found = resuming.newest_whole(tmp_path)
    assert found is not None
    assert found.train_step == 5


def test_where_none_is_whole_the_remedy_is_named_and_nothing_deleted(tmp_path: Path) -> None:
    for train_step in (5, 10):
        cut(save(tmp_path, train_step) / resuming.STATE)
    with pytest.raises(StageError, match=f"{tmp_path} holds no whole checkpoint .*: delete it to train from"):
        resuming.newest_whole(tmp_path)
    assert steps(tmp_path) == [5, 10]


def test_what_a_killed_run_left_unfinished_is_never_read(tmp_path: Path) -> None:
    (tmp_path / resuming.UNFINISHED).mkdir()
    (tmp_path / resuming.UNFINISHED / resuming.STATE).write_bytes(b"half")
    assert resuming.newest_whole(tmp_path) is None
    resuming.remove_unfinished(tmp_path)
    save(tmp_path, 5)
    assert [file.name for file in tmp_path.iterdir()] == ["step-00000005"]
    assert set(json.loads((tmp_path / "step-00000005" / resuming.DESCRIPTION).read_bytes())["files"]) == {
        resuming.STATE
    }


def test_a_checkpoint_of_an_earlier_version_is_refused_and_kept(tmp_path: Path) -> None:
    """It held DeepSpeed's own files, which only a launch of the same layout could read."""
    tag = save(tmp_path, 5)
    (tag / resuming.STATE).rename(tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    description = json.loads((tag / resuming.DESCRIPTION).read_bytes())
    record = description["files"].pop(resuming.STATE)
    description["files"]["zero_pp_rank_0_mp_rank_00_optim_states.pt"] = record
    del description["precision"]
    description["layout"] = {"processes": 2, "precision": "fp32", "stage": 2}
    (tag / resuming.DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises(
        StageError, match=rf"^{tag} was written by an earlier version .*, or delete {tmp_path}"
    ):
        resuming.newest_whole(tmp_path)
    assert steps(tmp_path) == [5]


def test_what_is_no_folder_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-by-step.txt").touch()
    assert resuming.newest_whole(tmp_path) is None
    save(tmp_path, 5)
    save(tmp_path, 10)
    assert save(tmp_path, 15).is_dir()
    (tmp_path / "step-by-step.txt").unlink()
    assert steps(tmp_path) == [10, 15]


def test_a_file_that_cannot_be_read_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk with a bad block, or as another user."""
    save(tmp_path, 5)
    save(tmp_path, 10)

    def refuse(file: Path) -> str:
        if file.parent.name == "step-00000010":
            raise StageError(f"{file} cannot be read (Input/output error)")
        return read(file)

    read = resuming.file_digest
    monkeypatch.setattr(resuming, "file_digest", refuse)
    found = resuming.newest_whole(tmp_path)
    assert found is not None
    assert found.train_step == 5
