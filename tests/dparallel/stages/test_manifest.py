import json

import pytest

from dparallel.config.experiment import MergingConfig
from dparallel.stages.manifest import Stage, StageError, fingerprint, read_manifest, verify


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def finish(folder, model_folder, text="result", **settings):
    stage = Stage("merging", MergingConfig(**settings), {"teacher": model_folder}, folder)
    (folder / "result.txt").write_text(text, encoding="utf-8")
    return stage.finish(["result.txt"], counts={"prompts": 3}, metrics={"difference": 0.5})


def test_a_finished_stage_is_found_again(tmp_path, model_folder):
    made = finish(tmp_path / "out", model_folder)
    again = Stage("merging", MergingConfig(), {"teacher": model_folder}, tmp_path / "out")
    assert again.done == made
    assert made.counts == {"prompts": 3}
    assert made.files["result.txt"].bytes == 6
    assert made.inputs == {"teacher": fingerprint(model_folder)}


def test_an_unfinished_stage_is_no_result(tmp_path, model_folder):
    stage = Stage("merging", MergingConfig(), {"teacher": model_folder}, tmp_path / "out")
    assert stage.done is None
    with pytest.raises(StageError, match="unfinished"):
        fingerprint(tmp_path / "out")
    with pytest.raises(StageError, match="no finished stage"):
        read_manifest(tmp_path / "out")


def test_other_settings_or_inputs_are_refused_by_name(tmp_path, model_folder):
    finish(tmp_path / "out", model_folder)
    with pytest.raises(StageError, match=r"config\.tolerance: 0\.0001 there, 0\.5 now.*another folder"):
        Stage("merging", MergingConfig(tolerance=0.5), {"teacher": model_folder}, tmp_path / "out")
    (model_folder / "model.safetensors").write_bytes(b"others!")
    with pytest.raises(StageError, match=r"inputs\.teacher"):
        Stage("merging", MergingConfig(), {"teacher": model_folder}, tmp_path / "out")
    assert verify(tmp_path / "out").stage == "merging"


def test_a_models_fingerprint_holds_all_that_it_is_spoken_to_with(model_folder):
    """Merges decide how a text becomes tokens, templates how a turn becomes a text."""
    (model_folder / "additional_chat_templates").mkdir()
    known = {fingerprint(model_folder)}
    for name in ("merges.txt", "vocab.tiktoken", "additional_chat_templates/tools.jinja", "config.json"):
        for content in ("a", "b"):
            (model_folder / name).write_text(content, encoding="utf-8")
            assert fingerprint(model_folder) not in known
            known.add(fingerprint(model_folder))
    (model_folder / "README.md").write_text("says nothing", encoding="utf-8")
    assert fingerprint(model_folder) in known


def test_foreign_folders_are_left_alone(tmp_path, model_folder):
    with pytest.raises(StageError, match="not empty and not a stage's folder"):
        Stage("merging", MergingConfig(), {}, model_folder)
    with pytest.raises(StageError, match="no such folder"):
        Stage("merging", MergingConfig(), {"teacher": tmp_path / "none"}, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StageError, match="neither a manifest.json nor a model"):
        fingerprint(tmp_path / "empty")


def test_damage_is_found_and_named(tmp_path, model_folder):
    finish(tmp_path / "out", model_folder)
    (tmp_path / "out" / "result.txt").write_text("resulT", encoding="utf-8")
    with pytest.raises(StageError, match=r"result\.txt does not match manifest\.json"):
        verify(tmp_path / "out")
    with pytest.raises(StageError, match=r"result\.txt does not match"):  # also as the next stage's input
        fingerprint(tmp_path / "out")
    (tmp_path / "out" / "result.txt").unlink()
    with pytest.raises(StageError, match=r"result\.txt is missing"):
        verify(tmp_path / "out")
    with pytest.raises(StageError, match="was made by stage 'merging', expected 'training'"):
        read_manifest(tmp_path / "out", "training")


def test_fingerprint_follows_content_and_origin_not_time(tmp_path, model_folder):
    one = finish(tmp_path / "one", model_folder)
    two = finish(tmp_path / "two", model_folder)
    assert one.fingerprint == two.fingerprint == fingerprint(tmp_path / "one")
    assert finish(tmp_path / "three", model_folder, text="other").fingerprint != one.fingerprint
    assert finish(tmp_path / "four", model_folder, tolerance=0.1).fingerprint != one.fingerprint


def test_manifest_is_plain_json(tmp_path, model_folder):
    finish(tmp_path / "out", model_folder)
    raw = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert raw["versions"].keys() == {"dparallel", "torch", "transformers"}
    assert not list((tmp_path / "out").glob(".*.partial"))
