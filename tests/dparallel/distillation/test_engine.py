"""DeepSpeed's settings and schedules, and descriptions of checkpoints; nothing is launched."""

import pytest
import torch

from dparallel.config.base import ConfigError
from dparallel.config.experiment import OptimizerConfig
from dparallel.distillation import engine
from dparallel.distillation.optimizer import adamw, learning_rate_factor
from dparallel.distillation.settings import REDUCE_BUCKET_SIZE
from tests.dparallel.distillation.conftest import training_config


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.5, 1, 1, 1]), ("linear", [0.5, 1, 1, 0.5]), ("cosine", [0.5, 1, 1, 0.5])],
)
def test_schedules_by_hand(schedule: str, expected: list[float]) -> None:
    optimizer = OptimizerConfig(learning_rate=1, schedule=schedule, warmup_ratio=0.2)
    # 10 steps, 2 of warm-up, 8 of schedule: its middle is after 6
    assert [learning_rate_factor(optimizer, done, 10) for done in (0, 1, 2, 6)] == pytest.approx(expected)


def test_adamw_has_the_settings_of_the_optimizer() -> None:
    settings = OptimizerConfig(learning_rate=1e-3, betas=(0.8, 0.95), weight_decay=0.25)
    (group,) = adamw([torch.nn.Parameter(torch.zeros(2))], settings, compiled=False).param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-3, (0.8, 0.95), 0.25)


def test_deepspeed_settings_are_filled_in() -> None:
    made = engine.deepspeed_config(
        training_config(), processes=2, micro_views=2, accumulation=3, dtype=torch.bfloat16
    )
    assert made["zero_optimization"] == {"stage": 2, "reduce_bucket_size": REDUCE_BUCKET_SIZE}
    assert (made["train_batch_size"], made["train_micro_batch_size_per_gpu"]) == (12, 2)
    assert (made["gradient_accumulation_steps"], made["gradient_clipping"]) == (3, 1.0)
    assert made["bf16"] == {"enabled": True}


def test_wrong_deepspeed_settings_are_refused() -> None:
    wrong = training_config(deepspeed={"zero_optimization": {"stage": 0}})
    with pytest.raises(ConfigError, match="stage=0: give 1, 2 or 3"):
        engine.deepspeed_config(wrong, 1, 2, 1, torch.float32)
