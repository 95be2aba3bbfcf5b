"""No secret of the environment is in anything that a run leaves: files, databases, logs, printed lines."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

CANARY = "c4n4ry"  # part of every secret
SECRETS = {
    "HF_TOKEN": f"hf_{CANARY}",
    "AWS_ACCESS_KEY_ID": f"AKIA{CANARY}",
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}/aws",
    "AWS_SESSION_TOKEN": f"{CANARY}+session",
    "GITHUB_TOKEN": f"ghp_{CANARY}",
    "OPENAI_API_KEY": f"sk-{CANARY}",
    "PGPASSWORD": f"{CANARY}-pg",
    "DPARALLEL_MLFLOW_STORE": f"postgresql://me:{CANARY}@db/mlflow",
    "DPARALLEL_PREFECT_DATABASE": f"postgresql+asyncpg://me:{CANARY}@db/prefect",
    "DPARALLEL_NOTIFY_URL": f"https://hooks.example/{CANARY}",
    "https_proxy": f"http://me:{CANARY}@127.0.0.1:9",
}


def contents(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """All files of a folder; those of Parquet, which compresses, as text."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path, path.read_bytes()
            if path.suffix == ".parquet":
                table = pq.read_table(path)
                yield path, f"{table.schema.metadata} {table.to_pylist()}".encode()


def leaks(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path, content in contents(folder) if CANARY.encode() in content]


def test_leaks_are_found(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "secret.bin").write_bytes(b"\x00" + CANARY.encode() + b"\xff")
    (tmp_path / "clean.json").write_text("{}", encoding="utf-8")
    assert leaks(tmp_path) == ["a/secret.bin"]


@pytest.mark.slow
def test_a_whole_run_leaves_no_secret_of_its_environment(config_file: Path, tmp_path: Path) -> None:
    """Also of one whose training fails, with its errors and records."""
    environment = {
        **os.environ,
        **SECRETS,
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
    }
    printed = ""
    for override, code in (("name=small", 0), ("training.only_correct=true", 1)):
        command = [sys.executable, "-m", "flows.distill", "--config", str(config_file), "--set", override]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            timeout=900,
        )
        assert done.returncode == code, done.stdout
        printed += done.stdout
    assert CANARY not in printed
    assert {"runs", "mlflow.db", "prefect"} <= {path.name for path in tmp_path.iterdir()}
    assert leaks(tmp_path) == []
