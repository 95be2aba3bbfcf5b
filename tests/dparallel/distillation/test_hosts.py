import os
import shutil
import socket
from pathlib import Path

import pytest

from dparallel.config.base import ConfigError
from dparallel.config.experiment import LaunchConfig
from dparallel.distillation.hosts import check_hosts, is_this_machine, read_hostfile, world_size


def launched_on(folder: Path, text: str) -> LaunchConfig:
    path = folder / "hosts"
    path.write_text(text, encoding="utf-8")
    return LaunchConfig(launcher="deepspeed", hostfile=str(path))


def test_hosts_and_slots_in_the_files_order(tmp_path: Path) -> None:
    config = launched_on(tmp_path, "# two machines\nnode-b slots=4\n\n10.0.0.2   slots=8  # bigger\n")
    assert list(read_hostfile(str(config.hostfile)).items()) == [("node-b", 4), ("10.0.0.2", 8)]
    assert world_size(config) == 12
    assert world_size(LaunchConfig(processes=3)) == 3


def test_a_hostfile_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin").write_bytes("rödö slots=1\n".encode("latin-1"))
    for path, message in (
        (tmp_path / "none", "no such file"),
        (tmp_path, "no such file"),
        (tmp_path / "pipe", "no such file"),
        (tmp_path / ("x" * 300), r"cannot be read \(File name too long\)"),
        (tmp_path / "latin", r"not UTF-8 .*save it as UTF-8"),
    ):
        with pytest.raises(ConfigError, match=rf"launch\.hostfile=.*{message}"):
            world_size(LaunchConfig(launcher="deepspeed", hostfile=str(path)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host: write a line HOST slots=N"),
        ("# nobody\n", "names no host"),
        ("node-a slots=2\nnode-b\n", "line 2: 'node-b' is not HOST slots=N"),
        ("node-a slots=0\n", "line 1: 'node-a slots=0' is not HOST slots=N"),
        ("node-a slots=2 max=3\n", "line 1: .* is not HOST slots=N"),
        ("node-a slots=2\nnode-a slots=4\n", "line 2: host node-a is named twice"),
    ],
)
def test_a_wrong_hostfile_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"launch.hostfile=.*hosts.*{message}"):
        check_hosts(launched_on(tmp_path, text))


def test_a_missing_hostfile_is_named() -> None:
    with pytest.raises(ConfigError, match=r"launch\.hostfile=nowhere: no such file"):
        check_hosts(LaunchConfig(launcher="deepspeed", hostfile="nowhere"))


def test_other_machines_need_ssh_and_pdsh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = launched_on(tmp_path, "node-a slots=2\nnode-b slots=2\n")
    bare = tmp_path / "bin"
    bare.mkdir()
    monkeypatch.setenv("PATH", str(bare))
    with pytest.raises(ConfigError, match="names node-a, node-b, .* not installed here: ssh, pdsh"):
        check_hosts(config)
    for program in ("ssh", "pdsh"):
        (bare / program).write_text("#!/bin/sh\n", encoding="utf-8")
        (bare / program).chmod(0o755)
    assert shutil.which("pdsh")
    check_hosts(config)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", socket.gethostname()])
def test_this_machine_alone_needs_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    check_hosts(launched_on(tmp_path, f"{host} slots=2\n"))
    assert is_this_machine({host: 2})
    assert not is_this_machine({host: 2, "node-b": 2})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"launcher": "torchrun"}, "hostfile='hosts' with launcher='torchrun'"),
        ({"launcher": "deepspeed", "processes": 2}, "processes=2 with hostfile='hosts'.*drop processes"),
    ],
)
def test_settings_that_contradict_a_hostfile(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LaunchConfig(hostfile="hosts", **settings)
