"""The settings file: what it may say, and that bad values are refused in one line before anything starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.local import databases
from deploy.local import settings as file
from deploy.local.settings import Settings, SettingsError, devices_of_workers, load

ROOT = Path(__file__).parents[2]
POSTGRES = "postgresql+asyncpg://ann:secret@db/prefect"


def loaded(folder: Path, text: str, **environment: str) -> Settings:
    (folder / ".env").write_text(text, encoding="utf-8")
    return load(folder, environment)[0]


def test_the_template_says_the_defaults_and_names_every_setting(tmp_path: Path) -> None:
    template = (ROOT / "deploy" / "settings.env").read_text(encoding="utf-8")
    assert loaded(tmp_path, template) == Settings() == load(tmp_path / "no", {})[0]
    for name in Settings.model_fields:
        assert f"\nDPARALLEL_{name.upper()}=" in template


def test_the_shell_overrides_the_file_and_other_variables_are_passed_on(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        "DPARALLEL_MLFLOW_PORT=1\nHF_HOME=/models\nDPARALLEL_SANDBOX=unshare\n", encoding="utf-8"
    )
    settings, others = load(tmp_path, {"DPARALLEL_MLFLOW_PORT": "2", "HOME": "/root"})
    assert settings.mlflow_port == 2
    assert others == {"HF_HOME": "/models", "DPARALLEL_SANDBOX": "unshare"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "DPARALLEL_MLFLOW_PORT=0",
            r"DPARALLEL_MLFLOW_PORT: .*greater than or equal to 1, got '0'; change it in",
        ),
        ("DPARALLEL_PREFECT_PORT=x", "DPARALLEL_PREFECT_PORT: .*integer.*got 'x'"),
        ("DPARALLEL_PREFECT_PORT=5000", "DPARALLEL_PREFECT_PORT and DPARALLEL_MLFLOW_PORT are both 5000"),
        ("DPARALLEL_HOST=nowhere.invalid", "DPARALLEL_HOST: 'nowhere.invalid' is no address"),
        ("DPARALLEL_CPU_RUNS=0", "DPARALLEL_CPU_RUNS: .*got '0'"),
        (
            "DPARALLEL_GPU_WORKERS=all",
            "DPARALLEL_GPU_WORKERS: write `auto` or a number from 0 to 64, got 'all'",
        ),
        (
            "DPARALLEL_PREFECT_DATABASE=postgresql://ann:secret@db/p",
            r"DPARALLEL_PREFECT_DATABASE: .*asyncpg://",
        ),
        ("DPARALLEL_MLFLOW_STORE=./mlruns", "DPARALLEL_MLFLOW_STORE: './mlruns' is no database of MLflow"),
        (
            "DPARALLEL_MLFLOW_PROT=5",
            "DPARALLEL_MLFLOW_PROT is no setting; did you mean DPARALLEL_MLFLOW_PORT",
        ),
    ],
)
def test_a_bad_value_is_one_line_that_names_setting_value_and_remedy(
    tmp_path: Path, line: str, message: str
) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        loaded(tmp_path, f"{line}\n")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_bad_values_end_the_command_with_2_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "prefect.yaml").touch()
    command = [sys.executable, "-m", "deploy.local", "up"]
    environment = {**os.environ, "DPARALLEL_PREFECT_PORT": "99999"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: DPARALLEL_PREFECT_PORT: ")
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".env", "prefect.yaml"]
    assert (tmp_path / ".env").stat().st_mode & 0o077 == 0, "passwords are written there"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:////no/where/mlflow.db", r"NAME: /no/where/mlflow\.db cannot be written; change it in"),
        ("sqlite+aiosqlite:////no/where/prefect.db", r"NAME: /no/where/prefect\.db cannot be written"),
        (
            "postgresql://ann:secret@127.0.0.1:1/mlflow",
            r"NAME: 127\.0\.0\.1:1/mlflow cannot be opened \(.*Connect call failed",
        ),
        ("postgresql+asyncpg://ann:secret@127.0.0.1:1/p", r"NAME: 127\.0\.0\.1:1/p cannot be opened"),
        ("postgresql://ann:secret@127.0.0.1:port/mlflow", "NAME: .*port/mlflow cannot be opened"),
    ],
)
def test_a_database_that_cannot_be_opened_is_named(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        databases.check({"NAME": url}, tmp_path)
    assert "secret" not in str(caught.value)
    databases.check({"empty": "", "local": "sqlite:///mlflow.db"}, tmp_path)


@pytest.mark.parametrize(
    ("workers", "gpus", "devices"),
    [
        ("auto", [], [None]),
        ("auto", ["0", "1"], ["0", "1"]),
        (0, ["0"], []),
        (3, [], [None, None, None]),
        (1, ["0", "1", "2"], ["0,1,2"]),
        (2, ["0", "1", "2"], ["0", "1,2"]),
    ],
)
def test_gpus_are_divided_among_workers(
    monkeypatch: pytest.MonkeyPatch, workers: object, gpus: list[str], devices: list[str | None]
) -> None:
    monkeypatch.setattr(file, "_gpus", lambda environment: gpus)
    assert devices_of_workers(Settings(gpu_workers=workers), {}) == devices  # type: ignore[arg-type]


def test_more_workers_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "_gpus", lambda environment: ["0"])
    with pytest.raises(SettingsError, match=r"DPARALLEL_GPU_WORKERS: 2 workers, but 1 GPUs; set at most 1"):
        devices_of_workers(Settings(gpu_workers=2), {})
