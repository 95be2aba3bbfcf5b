"""DeepSpeed's settings and schedules, and checkpoints by what they say of themselves; nothing is launched."""

from pathlib import Path

import pytest
import torch

from dparallel.config.base import ConfigError
from dparallel.config.experiment import OptimizerConfig
from dparallel.distillation import engine
from dparallel.distillation.settings import REDUCE_BUCKET_SIZE
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


def test_wrong_deepspeed_settings_are_refused() -> None:
    wrong = training_config(deepspeed={"zero_optimization": {"stage": 0}})
    with pytest.raises(ConfigError, match="stage=0: give 1, 2 or 3"):
        engine.deepspeed_config(wrong, 1, 2, 1, torch.float32)


def settings_of(**zero) -> dict:
    config = training_config(deepspeed={"zero_optimization": {"stage": 2, **zero}})
    return engine.deepspeed_config(config, 1, 2, 1, torch.float32)


def test_a_checkpoint_that_this_launch_cannot_read_is_refused_and_kept(tmp_path: Path) -> None:
    zero2, zero3 = settings_of(), settings_of(stage=3)
    made = engine.Checkpoint(train_step=5, processes=2, layout=engine.layout(zero2))
    (tmp_path / engine.LATEST).write_text(made.model_dump_json(), encoding="utf-8")
    two = engine.Process(0, 0, 2)
    assert engine.last_checkpoint(tmp_path, two, zero2) == made
    assert engine.last_checkpoint(tmp_path, two, settings_of(overlap_comm=True)) == made
    with pytest.raises(StageError, match="written by 2 processes, this launch has 1"):
        engine.last_checkpoint(tmp_path, engine.Process(0, 0, 1), zero2)
    with pytest.raises(
        StageError, match=r"written with stage=2, this launch has 3.* resume with training\.deepspeed"
    ):
        engine.last_checkpoint(tmp_path, two, zero3)
    with pytest.raises(StageError, match="offload_optimizer=None, this launch has cpu"):
        engine.last_checkpoint(tmp_path, two, settings_of(offload_optimizer={"device": "cpu"}))
    assert engine.last_checkpoint(tmp_path, two, zero2) == made
