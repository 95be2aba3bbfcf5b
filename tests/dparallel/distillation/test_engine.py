"""DeepSpeed's settings and schedules, and checkpoints by what they say of themselves; nothing is launched."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from dparallel.config.base import ConfigError
from dparallel.config.experiment import OptimizerConfig
from dparallel.distillation import engine
from dparallel.distillation.settings import REDUCE_BUCKET_SIZE, ZERO_KNOWN, check_deepspeed
from dparallel.stages.manifest import StageError
from tests.dparallel.distillation.conftest import training_config


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.5, 1, 1, 1]), ("linear", [0.5, 1, 1, 0.5]), ("cosine", [0.5, 1, 1, 0.5])],
)
def test_schedules_by_hand(schedule: str, expected: list[float]) -> None:
    optimizer = OptimizerConfig(learning_rate=1, schedule=schedule, warmup_ratio=0.2)
    # 10 steps, 2 of warm-up, 8 of schedule: its middle is after 6
    assert [engine.learning_rate_factor(optimizer, done, 10) for done in (0, 1, 2, 6)] == pytest.approx(
        expected
    )


def test_deepspeed_settings_are_filled_in() -> None:
    made = engine.deepspeed_config(
        training_config(), processes=2, micro_views=2, accumulation=3, dtype=torch.bfloat16
    )
    assert made["zero_optimization"] == {"stage": 2, "reduce_bucket_size": REDUCE_BUCKET_SIZE}
    assert (made["train_batch_size"], made["train_micro_batch_size_per_gpu"]) == (12, 2)
    assert (made["gradient_accumulation_steps"], made["gradient_clipping"]) == (3, 1.0)
    assert made["bf16"] == {"enabled": True}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": {"type": "Adam"}}, "deepspeed.optimizer is filled in: set training.optimizer"),
        ({"train_batch_size": 8}, "train_batch_size is filled in: set training.views_per_step"),
        ({"zero_optimization": {"stage": 0}}, "stage=0: give 1, 2 or 3"),
        ({"zero_optimization": {}}, "stage=None: give 1, 2 or 3"),
        ({"zero_optimization": 2}, r"zero_optimization=2 is no mapping: write .*\{stage: 2\}"),
        ({"zero_optimization": None}, "zero_optimization=None is no mapping"),
        (
            {"zero_optimizaton": {"stage": 3}},
            r"deepspeed\.zero_optimizaton is unknown; did you mean zero_opt",
        ),
        ({"amp": True}, r"deepspeed\.amp is unknown; known: .*zero_optimization"),
        (
            {"zero_optimization": {"stage": 2, "overlap_com": True}},
            "overlap_com is unknown; did you mean overl",
        ),
    ],
)
def test_deepspeed_settings_that_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_deepspeed(settings)
    with pytest.raises(ConfigError, match=message):
        engine.deepspeed_config(training_config(deepspeed=settings), 1, 2, 1, torch.float32)


def test_deepspeed_settings_that_are_accepted() -> None:
    check_deepspeed({})
    check_deepspeed({"wall_clock_breakdown": True})
    check_deepspeed({"zero_optimization": {"stage": 3, "overlap_comm": True}})


def test_known_zero_settings_are_deepspeeds() -> None:
    names = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert names >= ZERO_KNOWN


def test_checking_settings_does_not_import_deepspeed() -> None:
    code = "import sys, dparallel.distillation.settings; assert 'deepspeed' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_checkpoint_of_other_processes_is_refused(tmp_path: Path) -> None:
    made = engine.Checkpoint(train_step=5, processes=2)
    (tmp_path / engine.LATEST).write_text(made.model_dump_json(), encoding="utf-8")
    assert engine.last_checkpoint(tmp_path, engine.Process(0, 0, 2)) == made
    with pytest.raises(StageError, match="written by 2 processes, this launch has 1"):
        engine.last_checkpoint(tmp_path, engine.Process(0, 0, 1))
