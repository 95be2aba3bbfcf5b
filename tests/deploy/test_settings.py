"""The settings file: what it may say, and that bad values are refused in one line before anything starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.local import databases
from deploy.local import settings as file
from deploy.local.settings import Settings, SettingsError, check_machine, devices_of_workers, load, make_file
from dparallel.config import paths

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
            r"^DPARALLEL_GPU_WORKERS: write `auto` or a number from 0 to 64, got 'all'; change it in \.env$",
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
        ("postgresql://ann:secret@127.0.0.1:port/mlflow", "NAME: is no address .* give the port as a number"),
        ("postgresql://ann:secret/1@127.0.0.1:1/mlflow", "NAME: is no address .* %2F for /"),
        ("postgresql://ann:secret?1@127.0.0.1:1/mlflow", "NAME: "),
        ("postgresql://ann:secret#1@127.0.0.1:1/mlflow", "NAME: is no address .* %23 for #"),
        ("postgresql://127.0.0.1:1/mlflow?user=ann&password=secret", "NAME: .*cannot be opened"),
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"A=1\n\nB=gr\xf6\xdfe\n", "line 3: not UTF-8"),
        (b"A=1\nB=a\0b\n", "line 2: holds a null character"),
        (b"# secret\n\nDPARALLEL_PREFECT_PORT\n", "line 3: is not of the form NAME=VALUE"),
        (b"A=1\nDPARALLEL_PREFECT_PORT: 4300\n", "line 2: is not of the form"),
        (b"A=1\nexport B\n", "line 2: is not of the form"),
        (b"A='secret\n", "line 1: is not of the form"),
        (b"=secret\n", "line 1: is not of the form"),
    ],
)
def test_a_line_that_says_nothing_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / ".env").write_bytes(content)
    with pytest.raises(SettingsError, match=rf"\.env, {message}") as caught:
        load(tmp_path, {})
    assert "secret" not in str(caught.value)


def test_what_the_file_may_hold(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        "\ufeff# größe\n\nexport A=1\nB=\nC='x = y'  # comment\nD=${A}2\n", encoding="utf-8"
    )
    assert load(tmp_path, {})[1] == {"A": "1", "B": "", "C": "x = y", "D": "12"}
    (tmp_path / ".env").unlink()
    (tmp_path / ".env").mkdir()
    with pytest.raises(SettingsError, match=r"\.env cannot be read"):
        load(tmp_path, {})


@pytest.mark.parametrize(
    ("settings", "others", "message"),
    [
        ({"host": "192.0.2.1"}, {}, "DPARALLEL_HOST: 192.0.2.1 is no address of this machine; 127"),
        ({"roots": "/,/non/existent"}, {}, "DPARALLEL_ROOTS: /non/existent is no folder; create it"),
        ({"roots": "models, http://x"}, {}, "DPARALLEL_ROOTS: no store is known for http://"),
        ({}, {"DPARALLEL_STORE": "http://ann:secret@x"}, "DPARALLEL_STORE: no store is known for http://"),
        ({}, {"DPARALLEL_RUNS": "s3://ann:secret@x"}, "DPARALLEL_RUNS: 's3://…' is no folder"),
    ],
)
def test_what_this_machine_lacks_is_refused(
    tmp_path: Path, settings: dict[str, str], others: dict[str, str], message: str
) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        check_machine(Settings(**settings), others, tmp_path)  # type: ignore[arg-type]
    assert "secret" not in str(caught.value)


def test_what_this_machine_has_passes(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    for host in ("127.0.0.1", "localhost", "0.0.0.0"):
        check_machine(Settings(host=host, roots=f"models, s3://bucket,{tmp_path},"), {}, tmp_path)
    for store in ("", "runs", "s3://bucket/runs", "gs://bucket", "file:///runs"):
        check_machine(Settings(), {"DPARALLEL_STORE": store}, tmp_path)
    assert file.STORES == paths.STORES


def test_a_file_that_was_copied_by_hand_becomes_private(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DPARALLEL_MLFLOW_PORT=5001\n", encoding="utf-8")
    (tmp_path / ".env").chmod(0o644)
    assert not make_file(tmp_path)
    assert (tmp_path / ".env").stat().st_mode & 0o777 == 0o600
    assert load(tmp_path, {})[0].mlflow_port == 5001
