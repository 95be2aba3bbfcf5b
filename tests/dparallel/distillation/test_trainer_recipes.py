"""Real launches of recipes other than certainty forcing."""

from pathlib import Path

import pytest

from dparallel.config.experiment import LoraSettings
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


def test_d2f_is_the_same_work_in_two_processes_and_in_parts(
    tiny_checkpoint: Path, trajectories: Path, tmp_path: Path
) -> None:
    """Prompts of two lengths; the teacher's targets are equal with ZeRO stage 3 and checkpointing."""
    lora = LoraSettings(rank=4, alpha=16, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
    parts = {"micro_batch_size": 4, "deepspeed": {"zero_optimization": {"stage": 3}}}
    curves = []
    for name, processes, changes in (
        ("shared", 2, {}),
        ("parts", 1, {**parts, "gradient_checkpointing": True}),
    ):
        (tmp_path / name).mkdir()
        plan, out = write_plan(
            tmp_path / name,
            tiny_checkpoint,
            trajectories,
            shipped("d2f"),
            lora=lora,
            train_steps=6,
            **changes,
        )
        code, output = run(torchrun(plan, processes)) if processes > 1 else run_forked(plan)
        assert code == 0, output
        assert verify(out, "training").counts["train_steps"] == 6
        curves.append([[each[key] for key in CURVE] for each in read_metrics(out)])
    for mine, theirs in zip(*curves, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    for _, loss, cross_entropy, certainty, teacher, student, norm in curves[0]:
        assert loss == cross_entropy  # nothing else
        assert min(loss, certainty, norm) > 0
        assert student != pytest.approx(teacher, rel=1e-3)  # the teacher has full attention and no adapter
