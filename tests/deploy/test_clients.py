"""Commands in the project's folder find the servers of `make up`; afterwards they do without them."""

import tomllib
from pathlib import Path

from flows.environment import SERVERS, servers

import httpx
import pytest

from deploy.local import services, up
from deploy.local.settings import Settings

ROOT = Path(__file__).parents[2]


def test_prefect_and_flows_look_into_the_file_that_up_writes() -> None:
    configured = tomllib.loads((ROOT / "prefect.toml").read_text(encoding="utf-8"))
    assert configured["profiles_path"] == SERVERS == up.SERVERS.as_posix()
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert {"/.env", "/.dparallel/"} <= set(ignored)


def test_local_runs_are_told_where_mlflow_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert servers() == {}, "tests are not told about servers of the clone"
    monkeypatch.delenv("PREFECT_PROFILES_PATH")
    assert servers() == {}
    for settings, expected in (
        (Settings(), {"DPARALLEL_MLFLOW_UI": "http://127.0.0.1:5000"}),
        (Settings(mlflow_port=5001), {"DPARALLEL_MLFLOW_UI": "http://127.0.0.1:5001"}),
        (Settings(mlflow_artifacts="s3://files"), {"MLFLOW_TRACKING_URI": "http://127.0.0.1:5000"}),
    ):
        up._write_servers(tmp_path, services.clients(settings, tmp_path))
        assert servers() == expected
        profile = tomllib.loads((tmp_path / SERVERS).read_text(encoding="utf-8"))["profiles"]["up"]
        assert profile == {"PREFECT_API_URL": "http://127.0.0.1:4200/api"}
    up.remove_servers(tmp_path)
    assert servers() == {}


def test_a_damaged_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_PROFILES_PATH", str(tmp_path / "servers.toml"))
    for content in (b'[environment]\nDPARALLEL_MLFLOW_UI = "http', b"\xff"):
        (tmp_path / "servers.toml").write_bytes(content)
        with pytest.raises(SystemExit, match="^error: .*servers.toml is damaged .*: run `make up` again"):
            servers()


def test_servers_for_all_addresses_are_reached_by_loopback() -> None:
    assert Settings(host="0.0.0.0").prefect_url == "http://127.0.0.1:4200"
    assert Settings(host="localhost").mlflow_url == "http://localhost:5000"
    assert Settings(host="::1").mlflow_url == "http://[::1]:5000"
    assert Settings(host="::").prefect_url == "http://[::1]:4200", "servers take no IPv4 there"
    for host in ("0.0.0.0", "::", "::1", "localhost"):
        assert httpx.URL(Settings(host=host).prefect_url).port == 4200
