"""Inputs of one machine reach another one through the store, and determine the same keys there."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dparallel.cli.main import main
from dparallel.config.base import ConfigError
from dparallel.config.experiment import DistillConfig
from dparallel.config.files import load_config
from dparallel.stages.experiment import Experiment
from dparallel.stages.manifest import StageError, fingerprint
from dparallel.stages.snapshot import snapshot_of, take_snapshot
from dparallel.stages.storage.folders import Storage, open_storage
from dparallel.stages.storage.inputs import INPUTS, localized
from dparallel.stages.storage.remote import StorageError
from tasks.checks import checked_experiment
from tests.dparallel.stages.storage.conftest import finish

ROW = {"question": "1 + 1", "answer": "2"}


@pytest.fixture
def config(tmp_path: Path, tiny_checkpoint: Path) -> DistillConfig:
    """An experiment on the machine `here`, with a model and files of its own."""
    here = tmp_path / "here"
    shutil.copytree(tiny_checkpoint, here / "teacher")
    for name in ("train.jsonl", "more/a.jsonl", "more/b.jsonl", "valid.json", "copy/test.jsonl"):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text(json.dumps({**ROW, "from": name}) + "\n", encoding="utf-8")
    (here / "chat.jinja").write_text("{{ messages }}", encoding="utf-8")
    protocol = {"prompt": "{question}", "chat": True, "chat_template": str(here / "chat.jinja")}
    train = {
        "benchmark": "dataset",
        "sources": [
            {"path": str(here / "train.jsonl"), "reference": "answer"},
            {"path": str(here / "more" / "*.jsonl"), "reference": "answer"},
            {"path": str(here / "copy"), "reference": "answer"},
            {"path": "owner/name", "reference": "answer"},
        ],
        "protocol": protocol,
    }
    overrides = [
        f"trajectories.problems={json.dumps(train)}",
        f"teacher={here / 'teacher'}",
        f"store={tmp_path / 'store'}",
        f"runs={here / 'runs'}",
    ]
    return load_config(DistillConfig, "tiny.yaml", overrides)


def as_elsewhere(
    config: DistillConfig, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, DistillConfig]:
    """The parameter for workers, and the settings that one of them runs with."""
    parameter = Experiment(config, snapshot=snapshot_of(config, "own.yaml")).as_parameter()
    monkeypatch.setenv("DPARALLEL_RUNS", str(runs))
    settings = take_snapshot(json.loads(json.dumps(parameter))).experiment()
    return parameter, localized(settings)


def test_inputs_reach_another_machine(
    config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameter, there = as_elsewhere(config, tmp_path / "there", monkeypatch)
    teacher, before = fingerprint(config.teacher), config.trajectories.problems
    (tmp_path / "here").rename(tmp_path / "gone")
    assert "runs" not in parameter["settings"], "every machine has its own"
    assert fingerprint(there.teacher) == teacher
    assert Path(there.teacher).name == "teacher"
    files = there.trajectories.problems.files()
    assert all(file.is_relative_to(tmp_path / "there" / INPUTS) for file in files)
    names = ["train.jsonl", "a.jsonl", "b.jsonl", "test.jsonl", "chat.jinja"]
    assert [file.name for file in files] == names
    assert there.trajectories.problems.sources[3].path == "owner/name"
    (tmp_path / "gone").rename(tmp_path / "here")
    assert there.trajectories.what() == config.trajectories.what()
    assert [source.name for source in there.trajectories.problems.sources] == [
        source.name for source in before.sources
    ]
    keys = [Experiment(settings).trajectories().out_dir.rpartition("-")[2] for settings in (config, there)]
    assert keys[0] == keys[1], "the same key on both machines"


def test_what_is_there_is_not_sent_again(
    config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = as_elsewhere(config, tmp_path / "there", monkeypatch)
    sent: list[str] = []
    monkeypatch.setattr(Storage, "push_from", lambda self, folder, files, name: sent.append(name))
    again, _ = as_elsewhere(config, tmp_path / "there", monkeypatch)
    assert again == first, "so that a run in progress is joined"
    assert sent == []


def test_a_damaged_input_is_named(
    config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_elsewhere(config, tmp_path / "first", monkeypatch)
    [weights] = (tmp_path / "store" / INPUTS).glob("*/teacher/model.safetensors")
    weights.write_bytes(b"x" * weights.stat().st_size)
    with pytest.raises(StorageError, match="teacher/model.safetensors does not match"):
        as_elsewhere(config, tmp_path / "second", monkeypatch)
    shutil.rmtree(weights.parents[1])
    monkeypatch.setattr(Storage, "push_from", lambda self, folder, files, name: None)
    with pytest.raises(StorageError, match="is missing though it is listed"):
        as_elsewhere(config, tmp_path / "third", monkeypatch)


def test_a_teacher_by_url(config: DistillConfig, tmp_path: Path, tiny_checkpoint: Path) -> None:
    bucket = f"file://{tmp_path / 'bucket'}"
    shutil.copytree(tiny_checkpoint, tmp_path / "bucket" / "models" / "plain")
    given = config.model_copy(update={"teacher": f"{bucket}/models/plain"})
    assert fingerprint(localized(given).teacher) == fingerprint(tiny_checkpoint)
    made = finish(tmp_path / "bucket" / "exp" / "merging-a-0123456789", {"config.json": b"{}"})
    given = config.model_copy(update={"teacher": f"{bucket}/exp/merging-a-0123456789"})
    assert fingerprint(localized(given).teacher) == made.fingerprint
    with pytest.raises(ConfigError, match="bucket/exp holds no model"):
        localized(config.model_copy(update={"teacher": f"{bucket}/exp"}))


def test_stages_of_the_store_are_planned_without_their_files(config: DistillConfig, tmp_path: Path) -> None:
    there = config.model_copy(update={"runs": str(tmp_path / "there")})
    plan = Experiment(config).trajectories()
    with pytest.raises(StageError, match="stage 'training' cannot start: .*no such folder"):
        Experiment(there).training("consistency")
    made = finish(Path(plan.out_dir), {"part-00000.parquet": b"rows"})
    open_storage(str(config.store), config.runs).push(plan.out_dir)
    planned = Experiment(there).training("consistency")
    assert planned.store == config.store
    assert not Path(planned.inputs["trajectories"]).exists()
    assert Path(planned.out_dir).name == Path(Experiment(config).training("consistency").out_dir).name
    assert made.fingerprint


def test_the_environment_names_the_store_of_configs_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPARALLEL_STORE", "s3://bucket/runs")
    assert take_snapshot("tiny.yaml").experiment().store == "s3://bucket/runs"
    assert take_snapshot("tiny.yaml", ["store=gs://other"]).experiment().store == "gs://other"
    assert take_snapshot("tiny.yaml", ["store=null"]).experiment().store is None
    monkeypatch.setenv("DPARALLEL_STORE", "s3://user:secret@bucket")
    with pytest.raises(ConfigError, match="DPARALLEL_STORE: store: the s3:// URL holds a name or password"):
        take_snapshot("tiny.yaml")


def test_a_store_that_cannot_be_used_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    overrides = [f"store={tmp_path / 'file' / 'store'}", f"runs={tmp_path / 'runs'}"]
    with pytest.raises(StorageError, match="file/store cannot be used"):
        checked_experiment("tiny.yaml", overrides)
    assert main(["plan", "tiny.yaml", "--set", *overrides]) == 2
    assert not (tmp_path / "runs").exists()
