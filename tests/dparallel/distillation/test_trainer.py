"""Real launches: DeepSpeed in one and two processes, killed and resumed, stopped by non-finite numbers."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from dparallel.config.experiment import LoraSettings, OptimizerConfig, StudentConfig, TrainingConfig
from dparallel.config.recipe import RecipeConfig
from dparallel.distillation import engine, resuming
from dparallel.distillation.trainer import Trainer
from dparallel.models.checkpoints import load_model, save_model
from dparallel.stages import metrics_log, progress
from dparallel.stages.lease import LEASE
from dparallel.stages.manifest import MANIFEST, verify
from dparallel.tiny.tokenizer import build_tokenizer
from tests.conftest import random_model
from tests.dparallel.distillation.conftest import (
    NO_GPU,
    curve,
    read_metrics,
    record,
    run,
    run_forked,
    run_plan,
    shipped,
    torchrun,
    trajectory_rows,
    write_plan,
)

NAMES = ("loss", "tokens", "student_entropy", "teacher_entropy")


@pytest.fixture(scope="module")
def trained(tiny_checkpoint: Path, trajectories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted training with one process."""
    plan, out = write_plan(tmp_path_factory.mktemp("trained"), tiny_checkpoint, trajectories)
    code, output = run(torchrun(plan))
    assert code == 0, output
    assert "step 24 of 24: loss" in output
    return out


def test_it_learns_and_reports(trained: Path) -> None:
    manifest = verify(trained, "training")
    assert sorted(manifest.files) == ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    assert sorted(each.name for each in (trained / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    counts = {"rows_read": 30, "left_out_incorrect": 6, "left_out_too_long": 0, "rows_used": 24}
    assert manifest.counts == {**counts, "train_steps": 24}
    metrics = read_metrics(trained)
    assert [record["train_step"] for record in metrics] == list(range(1, 25))
    for each in metrics:
        assert each["loss"] == pytest.approx(each["cross_entropy"] + 2 * each["certainty"], rel=1e-5)
        assert each["tokens_per_second"] > 0
        assert each["peak_memory_bytes"] > 1e8
    first, last = metrics[0], metrics[-1]
    assert first["teacher_entropy"] == pytest.approx(first["student_entropy"], rel=1e-5)  # adapter is 0
    assert last["teacher_entropy"] != pytest.approx(last["student_entropy"], rel=1e-2)
    assert sum(each["loss"] for each in metrics[-6:]) < 0.9 * sum(each["loss"] for each in metrics[:6])
    # 4 of the 24 steps warm up to 1e-2, then half a cosine over 20
    rates = [record["learning_rate"] for record in metrics]
    assert rates[:5] == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2, 1e-2])
    assert rates[14] == pytest.approx(5e-3)
    checkpoints = sorted(each.name for each in (trained / "checkpoints").glob("step-*"))
    assert checkpoints == ["step-00000020", "step-00000024"]


def test_adapter_loads_with_peft_and_changes_the_model(trained: Path, tiny_checkpoint: Path) -> None:
    canvas = torch.tensor([[10, 11, 1, 1]])
    base = load_model(tiny_checkpoint, device="cpu")
    with torch.no_grad():
        before = base(canvas)
        after = PeftModel.from_pretrained(base, str(trained / "adapter"))(canvas)
    assert (before - after).abs().max() > 1e-2


@pytest.mark.usefixtures("one_process")
def test_a_finished_training_is_not_repeated(trained: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in trained.rglob("*")}
    assert run_plan(trained.parent / "plan.json") == verify(trained)
    assert {file: file.stat().st_mtime_ns for file in trained.rglob("*")} == before


def test_settings_of_how_the_work_is_done_go_on_from_the_checkpoint(
    trained: Path, tiny_checkpoint: Path, trajectories: Path, tmp_path: Path
) -> None:
    """The settings that the plan proposes if memory is short; and a damaged newest checkpoint is skipped."""

    def stop(train_step: int) -> None:
        if train_step == 13:
            os.kill(os.getpid(), signal.SIGKILL)

    plan, out = write_plan(tmp_path, tiny_checkpoint, trajectories)
    code, output = run_forked(plan, stop)
    assert code == -signal.SIGKILL, output
    assert (out / LEASE).is_file()  # of a process that is gone
    # Other traces of a kill: half a line, half a checkpoint; and damage.
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('no record\n{"train_step": 3')
    (out / "checkpoints" / resuming.UNFINISHED).mkdir()
    state = out / "checkpoints" / "step-00000010" / resuming.STATE
    state.write_bytes(state.read_bytes()[:100])

    zero1 = {"zero_optimization": {"stage": 1}}
    how = {
        "micro_batch_size": 4,
        "gradient_checkpointing": True,
        "checkpoint_every": 7,
        "deepspeed": zero1,
    }
    assert write_plan(tmp_path, tiny_checkpoint, trajectories, **how) == (plan, out)
    code, output = run_forked(plan)
    assert code == 0, output
    assert "from step 6," in output
    assert f"{state} is damaged; going on from train step 5" in output
    assert "metrics.jsonl, line 13 is damaged and left out" in output
    assert "its lease is taken over" in output
    assert [row[0] for row in curve(out)] == list(range(1, 25))
    for mine, theirs in zip(curve(out), curve(trained), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    assert sorted(file.name for file in (out / "checkpoints").glob("step-*")) == [
        "step-00000021",
        "step-00000024",
    ]
    assert verify(out).counts == verify(trained).counts
    assert verify(out).how["training"]["micro_batch_size"] == 4
    assert verify(out).how["training"]["deepspeed"] == zero1
    assert not (out / LEASE).exists()

    # Only what is damaged is written again
    (out / "manifest.json").write_text("", encoding="utf-8")
    code, output = run_forked(plan)
    assert code == 2
    assert output.splitlines()[-1].startswith(
        f"dparallel.distillation: error: {out}/manifest.json is damaged ("
    )
    (out / "manifest.json").unlink()
    (out / "adapter" / "adapter_model.safetensors").unlink()
    before = verify(trained)
    code, output = run_forked(plan)
    assert code == 0, output
    assert verify(out).files.keys() == before.files.keys()


@pytest.mark.slow  # six processes
def test_dropout_and_the_optimizer_survive_a_kill_to_the_bit(
    tiny_checkpoint: Path, trajectories: Path, tmp_path: Path
) -> None:
    """Also with a recipe that changes during training."""
    optimizer = OptimizerConfig(learning_rate=1e-2, betas=(0.8, 0.95), weight_decay=0.25)
    plans = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        plans.append(
            write_plan(
                tmp_path / name,
                tiny_checkpoint,
                trajectories,
                recipe=shipped("d3llm"),
                lora=LoraSettings(rank=4, alpha=16, dropout=0.1),
                optimizer=optimizer,
                train_steps=12,
                checkpoint_every=3,
            )
        )
    (whole_plan, whole), (killed_plan, killed) = plans
    code, output = run(torchrun(whole_plan, processes=2))
    assert code == 0, output
    kill_at_first_checkpoint(torchrun(killed_plan, processes=2), killed)
    assert not (killed / MANIFEST).exists()
    code, output = run(torchrun(killed_plan, processes=2))
    assert code == 0, output
    assert "from step 1," not in output
    assert curve(killed) == curve(whole)
    assert verify(killed).files == verify(whole).files


def kill_at_first_checkpoint(command: list[str], out: Path) -> None:
    """Start a training and SIGKILL one of its workers when a checkpoint is complete."""
    silent = subprocess.DEVNULL
    with subprocess.Popen(command, env=NO_GPU, stdout=silent, stderr=silent) as launcher:
        deadline = time.monotonic() + 120
        while not list((out / "checkpoints").glob("step-*")):
            assert launcher.poll() is None, "training ended before its first checkpoint"
            assert time.monotonic() < deadline, "no checkpoint within two minutes"
            time.sleep(0.01)
        worker = psutil.Process(launcher.pid).children()[0]
        os.kill(worker.pid, signal.SIGKILL)
        assert launcher.wait(timeout=60) != 0


@pytest.mark.slow
def test_accumulation_zero3_and_checkpointing_change_nothing(
    trained: Path, tiny_checkpoint: Path, trajectories: Path, tmp_path: Path
) -> None:
    plan, out = write_plan(
        tmp_path,
        tiny_checkpoint,
        trajectories,
        micro_batch_size=4,
        gradient_checkpointing=True,
        deepspeed={"zero_optimization": {"stage": 3}},
        log_every=4,
    )
    code, output = run_forked(plan)
    assert code == 0, output
    expected = [row for row in curve(trained) if row[0] == 1 or row[0] % 4 == 0]
    for mine, theirs in zip(curve(out), expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    verify(out, "training")
    weights, expected_weights = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (out, trained)
    )
    assert weights.keys() == expected_weights.keys()
    for name, weight in expected_weights.items():
        torch.testing.assert_close(weights[name], weight, atol=2e-3, rtol=2e-2)


WHOLE_RESPONSE = RecipeConfig(region="response", masking="trajectory", certainty_weight=1.0)


def test_an_epoch_in_bf16_on_whole_responses(
    tiny_checkpoint: Path, trajectories: Path, tmp_path: Path
) -> None:
    epoch = {"recipe": WHOLE_RESPONSE, "precision": "bf16", "train_steps": None, "epochs": 1}
    plan, out = write_plan(tmp_path, tiny_checkpoint, trajectories, **epoch)
    code, output = run_forked(plan)
    assert code == 0, output
    assert verify(out, "training").counts["train_steps"] == 2  # 24 samples, 16 a step
    assert verify(out).details["precision"] == "bfloat16"


@pytest.mark.slow
def test_deepspeed_launcher(tiny_checkpoint: Path, trajectories: Path, tmp_path: Path) -> None:
    plan, out = write_plan(tmp_path, tiny_checkpoint, trajectories, recipe=WHOLE_RESPONSE, train_steps=2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", port]
    code, output = run([*launcher, "--module", "dparallel.distillation", str(plan)])
    assert code == 0, output
    assert verify(out, "training").counts["train_steps"] == 2


@pytest.mark.gpu
def test_a_bf16_step_on_a_gpu(tiny_checkpoint: Path, trajectories: Path, tmp_path: Path) -> None:
    plan, out = write_plan(tmp_path, tiny_checkpoint, trajectories, precision="auto", train_steps=1)
    code, output = run(torchrun(plan), env={**os.environ})
    assert code == 0, output
    assert verify(out, "training").details == {"processes": 1, "precision": "bfloat16"}
    (record,) = read_metrics(out)
    assert 0 < record["loss"] < 100
    assert 0 < record["peak_memory_bytes"] < 1e8  # the device's; the process itself takes more


def test_the_line_of_progress_has_the_loss_of_its_own_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And what is measured every 3 steps together with the step at which it was."""
    monkeypatch.setattr(progress, "TOLD_EVERY", 0.0)
    monkeypatch.setattr(engine, "save_checkpoint", lambda *_: None)
    monkeypatch.setattr(Trainer, "step", lambda _, step, measured: {name: float(step) for name in NAMES})
    optimizer = OptimizerConfig(learning_rate=1.0)
    config = StudentConfig(
        training=TrainingConfig(optimizer=optimizer, train_steps=5, log_every=3),
        recipe=RecipeConfig(masking="random", region="response"),
    )
    caplog.set_level("INFO", "dparallel")
    whole = SimpleNamespace(train=lambda: None)
    process = SimpleNamespace(first=True)
    Trainer(config, [1], SimpleNamespace(samples=1), whole, process, tmp_path, 5).train(1)
    lines = [text for text in caplog.messages if text.endswith(progress.LEFT)]
    assert [re.sub(r"(, \d+ tokens/s)?, 0:00 left$", "", line) for line in lines] == [
        "step 2 of 5: loss 2.0000",
        "step 3 of 5: loss 3.0000; at step 3 entropy 3.000 (teacher 3.000)",
        "step 4 of 5: loss 4.0000; at step 3 entropy 3.000 (teacher 3.000)",
        "step 5 of 5: loss 5.0000; at step 5 entropy 5.000 (teacher 5.000)",
    ]


def test_metrics_are_cut_back_to_a_step(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    for train_step in (1, 5, 10):
        metrics_log.append(file, {"train_step": train_step, "loss": 0.5})
    with file.open("a", encoding="utf-8") as half:
        half.write('{"train_st')
    metrics_log.cut_back(file, 9)
    assert [record["train_step"] for record in read_metrics(tmp_path)] == [1, 5]
    metrics_log.cut_back(file, 0)
    assert read_metrics(tmp_path) == []


def test_four_bit_weights_are_trained_on(tmp_path: Path) -> None:
    """The adapter learns as with full-precision weights, from nearly the same loss."""
    pytest.importorskip("bitsandbytes")
    teacher = tmp_path / "teacher"
    save_model(random_model(hidden_size=64, initializer_range=0.1), teacher, tokenizer=build_tokenizer())
    rows = record(tmp_path / "rows", teacher, trajectory_rows(30))
    first = []
    for quantization in (None, "nf4"):
        folder = tmp_path / str(quantization)
        folder.mkdir()
        plan, out = write_plan(folder, teacher, rows, quantization=quantization, gradient_checkpointing=True)
        code, output = run_forked(plan)
        assert code == 0, output
        losses = [each["loss"] for each in read_metrics(out)]
        assert sum(losses[-6:]) < 0.9 * sum(losses[:6])
        first.append(losses[0])
    assert first[0] != first[1]
    assert first[0] == pytest.approx(first[1], rel=0.1)
