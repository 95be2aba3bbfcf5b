"""Settings rejected before training starts: DeepSpeed's, 4-bit weights, locks of interrupted builds."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dparallel.config.base import ConfigError
from dparallel.distillation import settings
from dparallel.distillation.settings import (
    check_builds,
    check_deepspeed,
    check_quantization,
    offloads_weights,
    zero_stage,
)
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


def zero(stage: int = 2, **settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **settings}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (zero(reduce_bucket_size="auto"), r"reduce_bucket_size=auto .*transformers' Trainer.* drop the key"),
        (zero(3, offload_param={"pin_memory": "auto"}), r"offload_param\.pin_memory=auto .*drop the key"),
        (zero(reduce_bucket_size="5e8"), r"reduce_bucket_size='5e8': Input should be a valid integer"),
        (zero(reduce_bucket_size=5.5), r"reduce_bucket_size=5\.5: Input should be a valid integer"),
        (zero(reduce_bucket_size=0), r"reduce_bucket_size=0: Input should be greater than 0"),
        (zero(reduce_bucket_size=True), r"reduce_bucket_size=True: give a number, not true or false"),
        (zero(overlap_comm="yes please"), r"overlap_comm='yes please': Input should be a valid boolean"),
        (zero(reduce_buket_size=1), r"reduce_buket_size is unknown; did you mean reduce_bucket_size\?"),
        (zero(stage3_max_live_parameter=1), r"did you mean stage3_max_live_parameters\?"),
        (zero(offload_optimizer={"devise": "cpu"}), r"offload_optimizer\.devise is unknown; .* device\?"),
        (zero(offload_optimizer={"device": "CPU"}), r"\.device='CPU': Input should be 'none', 'cpu' or 'nv"),
        (zero(offload_optimizer="cpu"), r"offload_optimizer='cpu'.*: write offload_optimizer: {device: cpu}"),
        (zero(3, offload_param={"device": "nvme"}), r"offload_param\.device=nvme needs nvme_path"),
        (
            zero(3, offload_optimizer={"device": "nvme"}),
            r"offload_optimizer\.device=nvme: checkpoints cannot h",
        ),
        (
            zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}),
            r"offload_optimizer\.ratio=0\.5: .*\{device: cpu\}",
        ),
        (
            zero(3, offload_optimizer={"device": "cpu", "super_offload": True}),
            r"offload_optimizer\.super_offload=True: checkpoints cannot hold",
        ),
        (
            zero(offload_optimizer={"device": "cpu"}, zenflow={"topk_ratio": 0.1}),
            r"zenflow=.*: checkpoints can",
        ),
        (zero(offload_optimizer={"device": "cpu", "ratio": 0.5}), r"only supported for ZeRO Stage 3"),
        (
            zero(offload_param={"device": "cpu"}),
            r"offload_param at stage 2: .*ignores it there; set stage: 3",
        ),
        (zero(cpu_offload=True), r"cpu_offload is deprecated in DeepSpeed: set offload_optimizer instead"),
        (zero(compute_grad_norm=False), r"compute_grad_norm=False: gradients are clipped by their norm"),
        (zero(5), r"zero_optimization\.stage=5: give 1, 2 or 3"),
        (zero(0), r"zero_optimization\.stage=0: give 1, 2 or 3"),
        (zero(True), r"zero_optimization\.stage=True: give 1, 2 or 3"),
        ({"zero_optimization": {}}, r"zero_optimization\.stage=None: give 1, 2 or 3"),
        ({"zero_optimization": 2}, r"zero_optimization=2: Input should be a valid dictionary"),
        ({"zero_optimization": None}, r"zero_optimization=None: Input should be a valid dictionary"),
        ({"zero_optimizaton": {}}, r"zero_optimizaton is unknown; did you mean zero_optimization\?"),
        ({"train_batch_size": 8}, r"train_batch_size is filled in: set training\.views_per_step instead"),
        ({"zero": 1}, r"zero is unknown; known: aio, .*zero_optimization"),
        ({"wall_clock_breakdown": "yes"}, r"wall_clock_breakdown='yes': Input should be a valid boolean"),
        ({"bf16": {"enabled": True}}, r"bf16 is filled in: set training\.precision"),
        ({"aio": {"block_siz": 1}}, r"aio\.block_siz is unknown; did you mean block_size\?"),
        ({"aio": {"block_size": "1M"}}, r"aio\.block_size='1M': Input should be a valid integer"),
        ({"flops_profiler": {"enable": True}}, r"flops_profiler\.enable is unknown; did you mean enabled\?"),
        (
            {"flops_profiler": {"enabled": "yes"}},
            r"flops_profiler\.enabled='yes': Input should be a valid bool",
        ),
        ({"comms_logger": {"prof_op": []}}, r"comms_logger\.prof_op is unknown; did you mean prof_ops\?"),
        (
            {"data_types": {"grad_acum_dtype": "fp32"}},
            r"grad_acum_dtype is unknown; did you mean grad_accum_d",
        ),
        (
            {"data_types": {"grad_accum_dtype": "fp17"}},
            r"grad_accum_dtype='fp17': Input should be 'fp16', 'b",
        ),
        (
            {"gradient_predivide_factor": 4},
            r"gradient_predivide_factor=4: Input should be less than or equal",
        ),
        ({"prescale_gradients": True}, r"prescale_gradients=True: Input should be False"),
    ],
)
def test_wrong_deepspeed_settings_are_named_with_what_is_valid(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^training\.deepspeed.*{message}") as refused:
        check_deepspeed(given)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "given",
    [
        {},
        zero(reduce_bucket_size=5e8, allgather_bucket_size=2e8),
        zero(1, round_robin_gradients=True),
        zero(offload_optimizer={"device": "cpu", "pin_memory": True}),
        zero(offload_optimizer=None, offload_param={"device": "none"}),
        zero(3, offload_param={"device": "cpu"}, stage3_prefetch_bucket_size=1e6),
        {"wall_clock_breakdown": True, "communication_data_type": "fp32"},
        {"prescale_gradients": False, "gradient_predivide_factor": 1.0},
        {"flops_profiler": {"enabled": True, "output_file": "flops.txt", "recompute_fwd_factor": 1}},
        {"comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]}, "aio": {"block_size": 1048576}},
        {"data_types": {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": ["norm"]}},
    ],
)
def test_what_deepspeed_takes_is_taken(given: dict[str, Any]) -> None:
    check_deepspeed(given)


@pytest.mark.slow
def test_deepspeed_is_imported_only_to_check_what_was_given() -> None:
    code = (
        "import sys\n"
        "from dparallel.distillation.settings import check_deepspeed\n"
        "check_deepspeed({})\n"
        "assert 'deepspeed' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_seed_that_torch_cannot_take_is_refused() -> None:
    with pytest.raises(ValueError, match=r"seed[\s\S]*less than 9223372036854775808"):
        training_config(seed=2**63)
    training_config(seed=2**63 - 1)
