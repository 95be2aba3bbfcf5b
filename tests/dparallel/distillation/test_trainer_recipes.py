"""Real launches of D2F, resumed under other layouts."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dparallel.config.experiment import LoraSettings
from dparallel.distillation.resuming import DESCRIPTION, step_tag
from dparallel.stages.manifest import verify
from tests.dparallel.distillation.conftest import read_metrics, run, run_forked, shipped, torchrun, write_plan

CURVE = (
    "train_step",
    "loss",
    "cross_entropy",
    "certainty",
    "teacher_entropy",
    "student_entropy",
    "grad_norm",
)


D2F: dict[str, Any] = {
    "recipe": shipped("d2f"),
    "lora": LoraSettings(rank=4, alpha=16, targets=("q_proj", "k_proj", "v_proj", "o_proj")),
    "train_steps": 6,
    "checkpoint_every": 3,
}
ZERO3 = {"zero_optimization": {"stage": 3}}


def curve(folder: Path) -> list[list[float]]:
    return [[record[key] for key in CURVE] for record in read_metrics(folder)]


def stopped_at(train_step: int, finished: Path, folder: Path) -> Path:
    """A copy of a finished training's folder as a stop after `train_step` would have left it."""
    (folder / "student").mkdir(parents=True)
    tag = Path("checkpoints", step_tag(train_step))
    shutil.copytree(finished / tag, folder / "student" / tag)
    for name in ("stage.json", "metrics.jsonl"):
        shutil.copy(finished / name, folder / "student" / name)
    return folder


def assert_same_training(resumed: Path, whole: Path) -> None:
    """Learning rates and train steps are equal, everything else within float32 rounding.

    Sums in another order change a gradient by about 1e-7 of itself, and AdamW's step of up to 1e-2 in
    proportion: 4e-8 in the adapter (measured), more where a gradient is near 0. Without the moments the
    adapter differs by 1e-2, with a wrong count of steps by 6e-3.
    """
    exact = ("train_step", "learning_rate")
    mine, theirs = ([[row[key] for key in exact] for row in read_metrics(out)] for out in (resumed, whole))
    assert mine == theirs
    for ours, expected in zip(curve(resumed), curve(whole), strict=True):
        assert ours == pytest.approx(expected, rel=1e-4, abs=1e-6)
    weights, expected_weights = (
        load_file(out / "adapter" / "adapter_model.safetensors") for out in (resumed, whole)
    )
    torch.testing.assert_close(weights, expected_weights, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_d2f_goes_on_in_one_process_and_in_parts_as_in_two(
    tiny_checkpoint: Path, trajectories: Path, tmp_path: Path
) -> None:
    """Prompts of two lengths; the teacher's targets are equal with ZeRO stage 3 and checkpointing."""
    (tmp_path / "shared").mkdir()
    plan, shared = write_plan(tmp_path / "shared", tiny_checkpoint, trajectories, **D2F)
    code, output = run(torchrun(plan, 2))
    assert code == 0, output
    assert verify(shared, "training").counts["train_steps"] == 6
    for _, loss, cross_entropy, certainty, teacher, student, norm in curve(shared):
        assert loss == cross_entropy  # nothing else
        assert min(loss, certainty, norm) > 0
        assert student != pytest.approx(teacher, rel=1e-3)  # the teacher has full attention and no adapter

    folder = stopped_at(3, shared, tmp_path / "parts")
    parts: dict[str, Any] = {"micro_batch_size": 4, "deepspeed": ZERO3, "gradient_checkpointing": True}
    plan, resumed = write_plan(folder, tiny_checkpoint, trajectories, **D2F, **parts)
    code, output = run_forked(plan)
    assert code == 0, output
    assert "from step 4," in output
    assert_same_training(resumed, shared)


@pytest.mark.slow
def test_a_training_goes_on_in_two_processes_with_offloading_and_back_in_one(
    tiny_checkpoint: Path, trajectories: Path, tmp_path: Path
) -> None:
    (tmp_path / "alone").mkdir()
    plan, alone = write_plan(tmp_path / "alone", tiny_checkpoint, trajectories, **D2F)
    code, output = run_forked(plan)
    assert code == 0, output

    folder = stopped_at(3, alone, tmp_path / "two")
    offload = {
        "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": False,
    }
    changes = {**D2F, "deepspeed": offload, "checkpoint_every": 5}
    plan, two = write_plan(folder, tiny_checkpoint, trajectories, **changes)
    code, output = run(torchrun(plan, 2))
    assert code == 0, output
    assert "from step 4," in output
    assert verify(two).details["processes"] == 2
    assert_same_training(two, alone)

    folder = stopped_at(5, two, tmp_path / "back")
    plan, back = write_plan(folder, tiny_checkpoint, trajectories, **D2F)
    description = back / "checkpoints" / step_tag(5) / DESCRIPTION
    written = description.read_text(encoding="utf-8")
    assert '"float32"' in written  # as if `precision: auto` had meant bf16 on the former machine
    description.write_text(written.replace('"float32"', '"bfloat16"'), encoding="utf-8")
    code, output = run_forked(plan)
    assert code == 0, output
    assert "from step 6," in output
    assert "trained in bfloat16 before, goes on in float32" in output
    assert_same_training(back, alone)
