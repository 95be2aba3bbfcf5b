import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

import flows.teacher
from dparallel.models.checkpoints import load_model, load_tokenizer
from flows.command import main

SETTINGS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "train_steps": 2,
    "batch_size": 4,
    "check_problems": 2,
}


def config_for(folder: Path, min_accuracy: float) -> str:
    path = folder / "teacher.yaml"
    path.write_text(
        yaml.safe_dump({**SETTINGS, "out": str(folder / "teacher"), "min_accuracy": min_accuracy}),
        encoding="utf-8",
    )
    return str(path)


@pytest.mark.usefixtures("prefect_server")
def test_a_teacher_by_command_ends_with_its_folder(
    tmp_path: Path, local_store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["teacher", "--config", config_for(tmp_path, 0.0)])
    main(flows.teacher.teacher, flows.teacher.plan, flows.teacher.run)
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "teacher")
    assert load_model(tmp_path / "teacher").config.vocab_size == len(load_tokenizer(tmp_path / "teacher"))
    client = MlflowClient(tracking_uri=local_store)
    experiment = client.get_experiment_by_name("teacher")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["teacher.train_steps"] == "2"


@pytest.mark.slow  # it starts a server of its own
@pytest.mark.usefixtures("local_store")
def test_the_folder_is_the_last_line_without_a_server_too(tmp_path: Path) -> None:
    """After the log, and after the exit message of the server that Prefect starts."""
    command = [sys.executable, "-m", "flows.teacher", "--config", config_for(tmp_path, 0.0)]
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    environment |= {"PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true"}
    ended = subprocess.run(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.splitlines()[-1] == str(tmp_path / "teacher")


@pytest.mark.usefixtures("prefect_server", "local_store")
def test_a_flow_that_fails_ends_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["teacher", "--config", config_for(tmp_path, 1.0)])
    with pytest.raises(SystemExit) as stop:
        main(flows.teacher.teacher, flows.teacher.plan, flows.teacher.run)
    assert str(stop.value.code).startswith("flow teacher failed: the teacher solves 0.0% of 2 validation")
