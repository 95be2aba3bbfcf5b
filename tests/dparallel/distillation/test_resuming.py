"""The checkpoint from which training resumes: the newest intact one that this launch can read."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dparallel.distillation import engine, resuming
from dparallel.stages.manifest import StageError
from tests.dparallel.distillation.conftest import training_config


def settings_of(**zero) -> dict:
    config = training_config(deepspeed={"zero_optimization": {"stage": 2, **zero}})
    return engine.deepspeed_config(config, 1, 2, 1, torch.float32)


LAYOUT = resuming.layout(settings_of(), processes=2)


def save(folder: Path, train_step: int, layout: dict = LAYOUT) -> Path:
    """A checkpoint of two files, as written by DeepSpeed."""
    unfinished = folder / resuming.UNFINISHED
    unfinished.mkdir(parents=True)
    (unfinished / "model_states.pt").write_bytes(b"model %d" % train_step)
    (unfinished / "optim_states.pt").write_bytes(b"optimizer %d" % train_step)
    resuming.keep(folder, train_step, layout)
    return folder / resuming.step_tag(train_step)


def steps(folder: Path) -> list[int]:
    return sorted(int(tag.name.removeprefix("step-")) for tag in folder.glob("step-*"))


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    assert resuming.newest_whole(tmp_path, LAYOUT) is None
    for train_step in (5, 10, 15):
        save(tmp_path, train_step)
    assert steps(tmp_path) == [10, 15]
    found = resuming.newest_whole(tmp_path, LAYOUT)
    assert found is not None
    assert (found.train_step, found.tag) == (15, "step-00000015")
    assert found.files.keys() == {"model_states.pt", "optim_states.pt"}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-2])


def flip(file: Path) -> None:
    file.write_bytes(b"M" + file.read_bytes()[1:])


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES = {
    "cut": lambda tag: cut(tag / "optim_states.pt"),
    "empty": lambda tag: (tag / "optim_states.pt").write_bytes(b""),
    "changed": lambda tag: flip(tag / "model_states.pt"),
    "missing": lambda tag: (tag / "model_states.pt").unlink(),
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
    found = resuming.newest_whole(tmp_path, LAYOUT)
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
    found = resuming.newest_whole(tmp_path, LAYOUT)
    assert found is not None
    assert found.train_step == 5


def test_where_none_is_whole_the_remedy_is_named_and_nothing_deleted(tmp_path: Path) -> None:
    for train_step in (5, 10):
        cut(save(tmp_path, train_step) / "model_states.pt")
    with pytest.raises(StageError, match=f"{tmp_path} holds no whole checkpoint .*: delete it to train from"):
        resuming.newest_whole(tmp_path, LAYOUT)
    assert steps(tmp_path) == [5, 10]


def test_what_a_killed_run_left_unfinished_is_never_read(tmp_path: Path) -> None:
    (tmp_path / resuming.UNFINISHED).mkdir()
    (tmp_path / resuming.UNFINISHED / "model_states.pt").write_bytes(b"half")
    assert resuming.newest_whole(tmp_path, LAYOUT) is None
    resuming.remove_unfinished(tmp_path)
    save(tmp_path, 5)
    assert [file.name for file in tmp_path.iterdir()] == ["step-00000005"]
    assert set(json.loads((tmp_path / "step-00000005" / resuming.DESCRIPTION).read_bytes())["files"]) == {
        "model_states.pt",
        "optim_states.pt",
    }


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (resuming.layout(settings_of(), 1), r"processes=2, this launch has 1 .*launch\.processes as it was"),
        (resuming.layout(settings_of(stage=3), 2), r"stage=2, this launch has 3 .*zero_optimization\.stage"),
        (
            resuming.layout(settings_of(offload_optimizer={"device": "cpu"}), 2),
            "offload_optimizer=None, this launch has cpu",
        ),
        ({**LAYOUT, "precision": "bf16"}, r"precision=fp32, this launch has bf16 .*training\.precision"),
    ],
)
def test_what_this_launch_cannot_read_is_refused_and_kept(tmp_path: Path, launch: dict, message: str) -> None:
    save(tmp_path, 5)
    with pytest.raises(StageError, match=message):
        resuming.newest_whole(tmp_path, launch)
    assert resuming.newest_whole(tmp_path, LAYOUT)


def test_settings_that_divide_nothing_may_change(tmp_path: Path) -> None:
    save(tmp_path, 5)
    other = resuming.layout(settings_of(overlap_comm=True, reduce_bucket_size=1000), 2)
    assert resuming.newest_whole(tmp_path, other)


def test_what_is_no_folder_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-by-step.txt").touch()
    assert resuming.newest_whole(tmp_path, LAYOUT) is None
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
    found = resuming.newest_whole(tmp_path, LAYOUT)
    assert found is not None
    assert found.train_step == 5
