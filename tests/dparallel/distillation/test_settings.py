"""What is refused before anything is loaded: 4 bits where they cannot be, builds that nobody is doing."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dparallel.config.base import ConfigError
from dparallel.distillation import settings
from dparallel.distillation.settings import check_builds, check_quantization, offloads_weights, zero_stage
from tests.dparallel.distillation.conftest import training_config

OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock taken an hour ago."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    file = tmp_path / "py311_cu130" / "cpu_adam" / "lock"
    file.parent.mkdir(parents=True)
    file.touch()
    os.utime(file, (time.time() - 3600,) * 2)
    return file


def test_a_lock_left_behind_is_named(lock: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{lock} was left .* 60 minutes ago.*delete it, and build once"):
        check_builds(OFFLOAD)
    lock.unlink()
    check_builds(OFFLOAD)


def test_only_offloading_builds(lock: Path) -> None:
    check_builds({})
    check_builds({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}})


def test_a_build_that_runs_or_begins_is_waited_for(lock: Path) -> None:
    compiler = subprocess.Popen([sys.executable, "-c", "input()"], cwd=lock.parent, stdin=subprocess.PIPE)
    try:
        check_builds(OFFLOAD)
    finally:
        compiler.communicate(b"\n")
    with pytest.raises(ConfigError):
        check_builds(OFFLOAD)
    lock.touch()
    check_builds(OFFLOAD)


def test_stage_and_offloading_are_read() -> None:
    assert (zero_stage({}), zero_stage({"zero_optimization": {"stage": 3}})) == (2, 3)
    assert offloads_weights({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}})
    assert not offloads_weights(OFFLOAD)


def test_four_bits_and_partitioned_weights_do_not_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    check_quantization(training_config(quantization="nf4"))
    zero3 = {"zero_optimization": {"stage": 3}}
    with pytest.raises(ConfigError, match="quantization=nf4 with ZeRO stage 3.*use stage 2"):
        check_quantization(training_config(quantization="nf4", deepspeed=zero3))
    check_quantization(training_config(deepspeed=zero3))


def test_four_bits_need_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes.*pip install 'dparallel\[quantization\]'"):
        check_quantization(training_config(quantization="nf4"))
    check_quantization(training_config())
