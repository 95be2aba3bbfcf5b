"""Bad input from the command line: one clear line, exit code 2, and no server was started."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import flows.benchmark
import flows.distill
import flows.merging
import flows.teacher
import flows.training
import flows.trajectories
from dparallel.config.base import ConfigError
from flows.command import main

Refused = pytest.CaptureFixture[str]


def refusal(
    module: ModuleType, arguments: list[str], monkeypatch: pytest.MonkeyPatch, captured: Refused
) -> str:
    """What `python -m <module> <arguments>` says as it refuses to start."""
    name = module.__name__.removeprefix("flows.")
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as stop:
        main(getattr(module, name), module.plan)
    assert stop.value.code == 2
    said = captured.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("nme=3", "did you mean 'name'"),
        ("training.train_steps=many", "training.train_steps"),
        ("teacher=nowhere/teacher", "nowhere/teacher"),
        ("trajectories.decoding.rule=guess", "known rules: confidence, dream_entropy"),
        ("trajectories.decoding.gen_length=35", "gen_length=35 is not divisible by block_length=12"),
        ("trajectories.decoding={gen_length: 60, block_length: 12}", "takes at most 4"),
        ("benchmark.reference.gen_length=72", "problem coins-test-0-00000"),
        (
            "benchmark.test={benchmark: dataset, sources: [{path: nowhere.jsonl}]}",
            "nowhere.jsonl: no such problems file",
        ),
        ("students.published.block_length=10", "does not divide trajectories.decoding.gen_length=36"),
        ("launch.processes=3", "views_per_step=4 is not divisible by 3 processes"),
        ("benchmark.test.split=validation", "benchmark.test and benchmark.validation share"),
        ("trajectories.problems.split=test", "trajectories.problems and benchmark.test share"),
        ("training.lora.targets=[q_proj, k_prj]", "LoRA target 'k_prj' matches in 0 of 2 layers"),
        ("training.max_length=40", "training.max_length=40 leaves nothing to train on"),
        ("training.deepspeed={zero_optimization: {stage: 5}}", "zero_optimization.stage=5"),
        ("runs=small.yaml/runs", "small.yaml is a file"),
    ],
)
def test_a_bad_experiment_is_refused(
    override: str, said: str, config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Refused
) -> None:
    arguments = ["--config", str(config_file), "--set", override]
    assert said in refusal(flows.distill, arguments, monkeypatch, capsys)


def test_no_server_is_started_for_a_bad_experiment(config_file: Path, tmp_path: Path) -> None:
    home = tmp_path / "prefect"
    command = [sys.executable, "-m", "flows.distill", "--config", str(config_file), "--set", "nme=3"]
    environment = {**os.environ, "PREFECT_HOME": str(home)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    assert not list(home.glob("*.db"))


def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Refused) -> None:
    for module in (flows.distill, flows.trajectories, flows.teacher):
        assert "nowhere.yaml" in refusal(module, ["--config", "nowhere.yaml"], monkeypatch, capsys)


def replace_in_config(teacher: Path, **fields: Any) -> None:
    file = teacher / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda teacher: replace_in_config(teacher, mask_token_id=999), "mask_token_id=999"),
        (
            lambda teacher: replace_in_config(teacher, model_type="gpt2"),
            "model_type='gpt2'; known: dparallel",
        ),
        (lambda teacher: (teacher / "model.safetensors").unlink(), "model.safetensors is missing"),
    ],
    ids=["mask id", "architecture", "weights"],
)
def test_a_teacher_that_does_not_fit_is_refused(
    damage: Callable[[Path], None],
    said: str,
    config_file: Path,
    tmp_path: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Refused,
) -> None:
    broken = Path(shutil.copytree(tiny_checkpoint, tmp_path / "teacher"))
    damage(broken)
    arguments = ["--config", str(config_file), "--set", f"teacher={broken}"]
    assert said in refusal(flows.distill, arguments, monkeypatch, capsys)


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="shows nothing on a machine with one GPU")
def test_more_processes_than_gpus_here_are_no_error(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training may run on another machine, and fits itself to that."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    large = SimpleNamespace(total_memory=2**36)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: large)
    assert flows.distill.plan(str(config_file), ["launch.processes=2"]).config.launch.processes == 2


def test_training_that_no_gpu_here_holds_is_refused_where_it_runs(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    small = SimpleNamespace(total_memory=2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: small)
    with pytest.raises(ConfigError, match=r"training needs .* on each GPU .* each has 1.00 MiB"):
        flows.training.plan(str(config_file))


def test_help_is_short(monkeypatch: pytest.MonkeyPatch, capsys: Refused) -> None:
    monkeypatch.setattr(sys, "argv", ["teacher", "--help"])
    with pytest.raises(SystemExit):
        main(flows.teacher.teacher, flows.teacher.plan)
    said = capsys.readouterr().out
    assert "Train the tiny teacher from scratch." in said
    assert "Args:" not in said


@pytest.mark.parametrize("module", [flows.training, flows.merging, flows.benchmark])
def test_a_stage_before_its_inputs_is_refused(
    module: ModuleType, config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Refused
) -> None:
    said = refusal(module, ["--config", str(config_file)], monkeypatch, capsys)
    assert "cannot start" in said
    assert "trajectories" in said


@pytest.mark.parametrize("module", [flows.training, flows.merging])
def test_an_unknown_student_is_refused(
    module: ModuleType, config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Refused
) -> None:
    arguments = ["--config", str(config_file), "--student", "nobody"]
    assert "no_certainty, published" in refusal(module, arguments, monkeypatch, capsys)
