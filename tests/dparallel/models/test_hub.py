"""Models on the Hub: what is downloaded when, from a local server or from the cache."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

from dparallel import load_model, load_tokenizer
from dparallel.models import hub
from dparallel.models.checkpoints import choose_format, read_config
from dparallel.models.formats import CheckpointError
from dparallel.models.offline import cache_if_offline
from tests.conftest import ROOT
from tests.dparallel.models.published import publish

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUGE = 10**18
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


class Hub(ThreadingHTTPServer):
    """A minimal Hub with `folder` as `some/model`, and `some/giant` with shards of HUGE bytes."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Requests)
        self.folder = folder
        self.fetched: list[str] = []


class Requests(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._answer(self._described(parts))
        name, file = "/".join(parts[:2]), self.server.folder / "/".join(parts[4:])
        if not file.is_file():
            return self._answer(b"", 404, {"X-Error-Code": "EntryNotFound"})
        if self.command == "GET":
            self.server.fetched.append(file.name)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{name}-{file.name}"'.replace("/", "-")}
        headers["X-Linked-Size"] = str(self._size(name, file))
        return self._answer(file.read_bytes(), 200, headers)

    do_GET = do_HEAD  # the base class's names

    def _described(self, parts: list[str]) -> bytes:
        name, kind = "/".join(parts[2:4]), parts[4]
        if kind == "tree":
            files = [each for each in self.server.folder.iterdir() if each.is_file()]
            tree = [
                {"type": "file", "path": each.name, "size": self._size(name, each), "oid": each.name}
                for each in files
            ]
            return json.dumps(tree).encode()
        return json.dumps({"id": name, "sha": COMMIT, "siblings": []}).encode()

    def _size(self, name: str, file: Path) -> int:
        giant = name == "some/giant" and file.suffix == ".safetensors"
        return HUGE if giant else file.stat().st_size

    def _answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Hub]:
    with Hub(publish(tmp_path / "source", "llada")) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.slow
def test_weights_are_downloaded_for_a_model_alone(server: Hub, tmp_path: Path) -> None:
    """In a separate process whose Hub is the local server."""
    script = """
import json, sys
from dparallel import load_model, load_tokenizer
from dparallel.models.checkpoints import CheckpointError, choose_format, read_config
def shards():
    from pathlib import Path
    return len([each for each in Path(sys.argv[1]).glob("hub/*/snapshots/*/*.safetensors")])
said = {"vocabulary": read_config("some/model").vocab_size, "format": choose_format("auto", "some/model")}
said["mask"] = load_tokenizer("some/model").convert_ids_to_tokens(255)
said["before"] = shards()
try:
    load_model("some/giant", "cpu")
except CheckpointError as error:
    said["giant"] = str(error)
said["between"] = shards()
said["pinned"] = read_config("some/model@COMMIT").vocab_size
load_model("some/model", "cpu")
said["after"] = shards()
print(json.dumps(said))
""".replace("COMMIT", COMMIT)
    home = tmp_path / "home"
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(home)}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(home)],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["vocabulary"], said["pinned"], said["format"]) == (256, 256, "original")
    assert said["mask"] == "<|mask|>"
    assert (said["before"], said["between"], said["after"]) == (0, 0, 3)
    assert "some/giant needs 3e+09 GB more on the disk of" in said["giant"]
    assert "GB free: make room there or set HF_HOME to a larger disk" in said["giant"]
    assert sorted(name for name in server.fetched if name.endswith(".safetensors")) == SHARDS
    assert server.fetched.count("config.json") == 1
    assert "README.md" not in server.fetched


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of `some/model` in the Hub's cache; no network is used."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert constants.HF_HUB_OFFLINE
    repository = tmp_path / "hub" / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    (repository / "refs" / "other").write_text(COMMIT, encoding="utf-8")
    return publish(repository / "snapshots" / COMMIT, "llada")


def test_a_cache_without_weights_is_enough_but_for_the_model(cached: Path) -> None:
    for shard in SHARDS:
        (cached / shard).unlink()
    assert read_config("some/model").mask_token_id == 255
    assert len(load_tokenizer("some/model")) == 256
    assert choose_format("auto", "some/model@other") == "original"
    with pytest.raises(CheckpointError, match="model-00001-of-00003.safetensors is missing"):
        load_model("some/model")
    with pytest.raises(CheckpointError, match="model-00001-of-00003.safetensors is missing"):
        read_config(cached)  # given as a folder it must be complete


def test_weights_in_the_cache_are_loaded_and_checked(cached: Path) -> None:
    assert load_model("some/model", "cpu").config.name_or_path == str(cached)
    (cached / SHARDS[1]).write_bytes(b"cut")
    for read in (load_model, read_config):
        with pytest.raises(CheckpointError, match="model-00002-of-00003.safetensors is damaged or cut short"):
            read("some/model")


def test_a_full_disk_is_no_missing_model(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(hub, "snapshot_download", full)  # stands for a full disk
    message = (
        r"some/model could not be downloaded to .*hub \(.*No space left.*\): make room there or set HF_HOME"
    )
    with pytest.raises(CheckpointError, match=message):
        read_config("some/model")


@pytest.mark.parametrize(
    "path", ["/nowhere/model", "./model", "../model", "~/model", "runs/a/model", "model/"]
)
def test_a_folder_that_is_not_there_is_no_name_on_the_hub(path: str) -> None:
    with pytest.raises(CheckpointError, match=r": no such folder \(looked in "):
        read_config(path)


def test_a_model_of_a_similar_name_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder beside it, and a teacher that comes with the package."""
    (tmp_path / "models" / "student").mkdir(parents=True)
    (tmp_path / "models" / "studend").touch()
    monkeypatch.chdir(tmp_path)
    for given, meant in (
        ("models/studnet", "models/student"),
        (f"{tmp_path}/models/studnet", f"{tmp_path}/models/student"),
        ("teachers/tinny", "teachers/tiny"),
    ):
        with pytest.raises(CheckpointError, match=rf"; did you mean '{meant}'\?$"):
            read_config(given)


@pytest.mark.parametrize("name", ["some/other", "some/model@nowhere", "a name"])
def test_unknown_names_are_named(cached: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name} is neither a folder here .* nor a model on the hub"):
        read_config(name)


def test_a_file_is_no_folder(cached: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"config\.json is a file: give the folder that holds the model"
    ):
        read_config(cached / "config.json")


def test_a_folder_comes_before_a_name(cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(cached, tmp_path / "some" / "model")
    assert load_model("some/model", "cpu").config.name_or_path == str(tmp_path / "some" / "model")


def test_without_an_address_of_the_hub_the_cache_is_used_at_once(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No retries, each with a line of its own; a proxy looks the name up itself."""
    asked = []

    def unknown(*arguments: object) -> None:
        asked.append(arguments)
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr("dparallel.models.offline.socket.getaddrinfo", unknown)
    monkeypatch.setattr("dparallel.models.offline.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with cache_if_offline() as offline:
        assert offline
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
    assert hub.checkpoint_folder("some/model", with_weights=False) == cached
    with pytest.raises(CheckpointError, match="some/other is neither .* the Hub cannot be reached"):
        hub.checkpoint_folder("some/other", with_weights=False)
    assert asked
    monkeypatch.setattr("dparallel.models.offline.getproxies", lambda: {"https": "http://proxy"})
    with cache_if_offline() as offline:
        assert not offline


def test_teachers_of_the_package_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub.checkpoint_folder("teachers/tiny") == ROOT / "teachers" / "tiny"
    (tmp_path / "teachers" / "tiny").mkdir(parents=True)
    assert hub.checkpoint_folder("teachers/tiny") == Path("teachers/tiny"), "one's own comes first"
    with pytest.raises(CheckpointError, match=r"teachers/tinny is neither a folder here"):
        hub.checkpoint_folder("teachers/tinny")
