"""Invalid input on the command line: one clear line, exit code 2, and no server is started."""

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
from dparallel.cli.plan import print_plan
from dparallel.config.base import ConfigError, UserError
from dparallel.stages.experiment import StagePlan
from dparallel.stages.manifest import Stage
from flows.command import main
from tasks.checks import checked_experiment

Refused = pytest.CaptureFixture[str]


def refusal(
    module: ModuleType, arguments: list[str], monkeypatch: pytest.MonkeyPatch, captured: Refused
) -> str:
    """The error message of `python -m <module> <arguments>`."""
    name = module.__name__.removeprefix("flows.")
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as stop:
        main(getattr(module, name), module.plan, module.run)
    assert stop.value.code == 2
    said = captured.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def test_an_unknown_option_names_the_nearest(monkeypatch: pytest.MonkeyPatch, capsys: Refused) -> None:
    monkeypatch.setattr(sys, "argv", ["training", "--config", "x.yaml", "--studnet", "a"])
    with pytest.raises(SystemExit, match="2"):
        main(flows.training.training, flows.training.plan, flows.training.run)
    command = "python -m flows.training"
    expected = f"{command}: error: unknown option --studnet; did you mean --student? see {command} --help\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("nme=3", "did you mean 'name'"),
        ("training.train_steps=many", "training.train_steps"),
        ("teacher=nowhere/teacher", "nowhere/teacher"),
        ("trajectories.decoding.rule=guess", "trajectories.decoding.rule: unknown"),
        ("trajectories.decoding.gen_length=35", "gen_length=35 is not divisible by block_length=12"),
        ("trajectories.decoding={gen_length: 60, block_length: 12}", "takes at most 4"),
        (
            "benchmarks.coins.reference.gen_length=72",
            "benchmarks.coins.reference: gen_length=72 is longer than",
        ),
        (
            "benchmarks.coins.test={benchmark: dataset, sources: [{path: nowhere.jsonl}], "
            "protocol: {scorers: [coins]}}",
            "nowhere.jsonl: no such problems file",
        ),
        ("students.published.block_length=10", "does not divide trajectories.decoding.gen_length=36"),
        ("launch.processes=3", "views_per_step=4 is not divisible by 3 processes"),
        (
            "benchmarks.coins.test.split=validation",
            "benchmarks.coins.test and benchmarks.coins.validation share",
        ),
        ("trajectories.problems.split=test", "trajectories.problems and benchmarks.coins.test share"),
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


@pytest.mark.slow
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
    """Training may run on another machine, and adapts to it."""
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
        main(flows.teacher.teacher, flows.teacher.plan, flows.teacher.run)
    said = capsys.readouterr().out
    assert "Train the tiny teacher from scratch." in said
    assert "Args:" not in said


@pytest.mark.parametrize("module", [flows.training, flows.merging, flows.benchmark])
def test_a_stage_before_its_inputs_names_the_command_that_makes_them(
    module: ModuleType, config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Refused
) -> None:
    settings = ["--config", str(config_file), "--set", "training.train_steps=4"]
    said = refusal(module, settings, monkeypatch, capsys)
    assert "needs finished trajectories" in said
    assert f"run python -m flows.trajectories {' '.join(settings)} first" in said


def finish(plan: StagePlan) -> None:
    stage = Stage(plan.stage, plan.settings(), plan.inputs, plan.out_dir)
    (stage.folder / "adapter").mkdir()
    (stage.folder / "adapter" / "weights").write_bytes(b"weights")
    stage.finish(["adapter/weights"])


def test_a_student_that_is_not_trained_or_merged_is_named_with_its_command(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Refused
) -> None:
    experiment = checked_experiment(str(config_file))
    finish(experiment.trajectories())
    finish(experiment.training("no_certainty"))
    arguments = ["--config", str(config_file)]
    train = f"run python -m flows.training --config {config_file} --student published first"
    said = refusal(flows.merging, arguments, monkeypatch, capsys)
    assert f"{train}, or merge only a student that is trained, with --student NAME" in said
    flows.merging.plan(str(config_file), student="no_certainty")
    assert train in refusal(flows.benchmark, arguments, monkeypatch, capsys)
    finish(experiment.training("published"))
    said = refusal(flows.benchmark, arguments, monkeypatch, capsys)
    assert f"run python -m flows.merging --config {config_file} --student no_certainty first" in said


def test_a_bug_in_a_check_keeps_its_traceback(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only users' errors are printed as one line; other ValueErrors are bugs."""

    def bug(*arguments: object) -> None:
        raise ValueError("zip() argument 2 is shorter than argument 1")

    monkeypatch.setattr("dparallel.preflight.checks.check_disjoint", bug)
    monkeypatch.setattr(sys, "argv", ["distill", "--config", str(config_file)])
    with pytest.raises(ValueError, match="is shorter than"):
        main(flows.distill.distill, flows.distill.plan, flows.distill.run)
    with pytest.raises(ValueError, match="is shorter than"):
        print_plan(str(config_file), [], None, 1000.0)


def rows(folder: Path, name: str, references: list[str | None]) -> str:
    """The settings of a data set whose rows have these references."""
    file = folder / f"{name}.jsonl"
    lines = [
        json.dumps({"prompt": f"{name} {row}", "reference": reference})
        for row, reference in enumerate(references)
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{{benchmark: dataset, sources: [{{path: {file}}}]}}"


@pytest.mark.parametrize(("section", "missing"), [("test", None), ("validation", " "), ("test", "")])
def test_a_row_that_cannot_be_scored_is_found_before_anything_is_recorded(
    section: str,
    missing: str | None,
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Refused,
) -> None:
    setting = f"benchmarks.coins.{section}={rows(tmp_path, 'coins', ['1', missing, '3'])}"
    other = {"test": "validation", "validation": "test"}[section]
    settings = [setting, f"benchmarks.coins.{other}.protocol.scorers=[exact]"]
    said = refusal(flows.distill, ["--config", str(config_file), "--set", *settings], monkeypatch, capsys)
    assert "problem coins-00002" in said
    assert "has no reference" in said
    with pytest.raises(UserError, match="problem coins-00002"):
        print_plan(str(config_file), settings, None, 1000.0)


def test_correct_trajectories_need_some_reference(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Refused
) -> None:
    def settings(*references: str | None, only_correct: str) -> list[str]:
        problems = rows(tmp_path, "coins", list(references))
        return [f"trajectories.problems={problems}", f"training.only_correct={only_correct}"]

    wrong = settings(None, None, only_correct="true")
    said = refusal(flows.distill, ["--config", str(config_file), "--set", *wrong], monkeypatch, capsys)
    assert "none of the 2 problems has a reference" in said
    assert "training.only_correct=false" in said
    flows.distill.plan(str(config_file), settings(None, "2", only_correct="true"))
    flows.distill.plan(str(config_file), settings(None, None, only_correct="false"))


def test_a_folder_that_cannot_be_written_is_refused(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Refused
) -> None:
    if os.getuid():
        unwritable = tmp_path / "locked"
        unwritable.mkdir(mode=0o555)
    else:  # no mode binds root
        unwritable = Path("/proc/self")
    setting = f"runs={unwritable}/runs"
    said = refusal(flows.distill, ["--config", str(config_file), "--set", setting], monkeypatch, capsys)
    assert f"{unwritable}/runs cannot be written to" in said
    assert "name another folder" in said
    with pytest.raises(ConfigError, match="cannot be written to"):
        print_plan(str(config_file), [setting], None, 1000.0)


def test_more_problems_than_can_be_drawn_are_refused_at_once(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Refused
) -> None:
    arguments = ["--config", str(config_file), "--set", "trajectories.problems.count=10000000000"]
    assert "count=10000000000" in refusal(flows.distill, arguments, monkeypatch, capsys)


@pytest.mark.parametrize("module", [flows.training, flows.merging])
def test_an_unknown_student_is_refused(
    module: ModuleType, config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Refused
) -> None:
    arguments = ["--config", str(config_file), "--student", "nobody"]
    assert "no_certainty, published" in refusal(module, arguments, monkeypatch, capsys)
