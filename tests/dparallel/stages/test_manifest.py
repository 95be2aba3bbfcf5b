import json
from datetime import UTC

import pytest

from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import MergingConfig, TrajectoriesConfig
from dparallel.stages.code import stage_digest
from dparallel.stages.manifest import Stage, StageError, fingerprint, read_manifest, stage_key, verify

DECODING = DecodingConfig(gen_length=4, block_length=2)


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


def test_a_time_without_its_offset_is_damage(tmp_path, model_folder):
    made = finish(tmp_path / "out", model_folder)
    for text, time in (("2026-11-26T12:41:35Z", (12, 41)), ("2026-11-26T12:41:35.5+02:00", (10, 41))):
        again = made.model_validate({**made.model_dump(), "finished_at": text})
        assert again.finished_at == text
        found = again.finished.astimezone(UTC)
        assert (found.hour, found.minute) == time
    for text in ("2026-11-26T12:41:35", "yesterday", ""):
        content = {**made.model_dump(), "finished_at": text}
        (tmp_path / "out" / "manifest.json").write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(StageError, match=r"manifest.json is damaged \(finished_at: '.*' is no time with"):
            read_manifest(tmp_path / "out")


def test_an_unfinished_stage_is_no_result(tmp_path, model_folder):
    stage = Stage("merging", MergingConfig(), {"teacher": model_folder}, tmp_path / "out")
    assert stage.done is None
    with pytest.raises(StageError, match="unfinished"):
        fingerprint(tmp_path / "out")
    with pytest.raises(StageError, match="no finished stage"):
        read_manifest(tmp_path / "out")


def test_other_settings_or_inputs_are_refused_by_name(tmp_path, model_folder):
    finish(tmp_path / "out", model_folder)
    with pytest.raises(StageError, match=r"config\.tolerance: 0\.0001 there, 0\.5 now.*move it aside"):
        Stage("merging", MergingConfig(tolerance=0.5), {"teacher": model_folder}, tmp_path / "out")
    (model_folder / "model.safetensors").write_bytes(b"others!")
    with pytest.raises(StageError, match=r"inputs\.teacher"):
        Stage("merging", MergingConfig(), {"teacher": model_folder}, tmp_path / "out")
    assert verify(tmp_path / "out").stage == "merging"


def test_files_keep_the_settings_that_they_were_begun_with(tmp_path, model_folder):
    def claim(**how):
        config = TrajectoriesConfig(problems={"benchmark": "coins", "count": 9}, decoding=DECODING, **how)
        stage = Stage("trajectories", config, {"teacher": model_folder}, tmp_path / "out")
        return stage, stage.as_begun(config, "shard_size")

    claim(shard_size=3)
    stage, config = claim(shard_size=5, batch_size=2)
    assert (config.shard_size, config.batch_size) == (3, 2)
    made = stage.finish(["stage.json"])
    assert (made.how["shard_size"], made.how["batch_size"]) == (3, 2)


@pytest.mark.parametrize("damage", ["", '{"stage": "mer', "[]"])
def test_a_damaged_manifest_is_named_with_what_to_do(tmp_path, model_folder, damage):
    finish(tmp_path / "out", model_folder)
    (tmp_path / "out" / "manifest.json").write_text(damage, encoding="utf-8")
    with pytest.raises(
        StageError, match=r"out/manifest\.json is damaged \(.*\): delete it and rerun"
    ) as raised:
        verify(tmp_path / "out")
    assert "pydantic" not in str(raised.value)
    (tmp_path / "out" / "manifest.json").unlink()
    stage = Stage("merging", MergingConfig(), {"teacher": model_folder}, tmp_path / "out")
    assert stage.finish(["result.txt"]) == verify(tmp_path / "out")


@pytest.mark.parametrize("damage", [None, "", '{"stage": "mer', "[]"])
def test_a_damaged_claim_is_written_again_where_the_folders_name_says_the_same(
    tmp_path, model_folder, damage, caplog
):
    inputs = {"teacher": model_folder}
    key = stage_key(
        MergingConfig(), {"teacher": fingerprint(model_folder)}, stage_digest("merging", MergingConfig())
    )
    for folder in (tmp_path / f"merging-{key}", tmp_path / "merging-0123456789"):
        finish(folder, model_folder)
        (folder / "stage.json").unlink()
        if damage is not None:
            (folder / "stage.json").write_text(damage, encoding="utf-8")
    stage = Stage("merging", MergingConfig(), inputs, tmp_path / f"merging-{key}")
    assert stage.done
    assert f"merging-{key}/stage.json was missing or damaged; it is written again" in caplog.text
    with pytest.raises(StageError, match=r"0123456789 is not empty .*stage\.json is missing or damaged"):
        Stage("merging", MergingConfig(), inputs, tmp_path / "merging-0123456789")


def test_a_models_fingerprint_holds_all_that_it_is_spoken_to_with(model_folder):
    """Merges determine the tokens of a text, templates the text of a conversation."""
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
    assert raw["versions"].keys() >= {"python", "dparallel", "torch", "transformers"}
    assert not list((tmp_path / "out").glob(".*.partial"))
