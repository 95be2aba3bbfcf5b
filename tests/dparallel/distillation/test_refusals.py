"""Training that is refused, or stopped by a full disk or numbers that are not finite, in one line."""

import os
import resource
import signal
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dparallel.config.experiment import OptimizerConfig
from dparallel.distillation.__main__ import main
from dparallel.distillation.errors import reported
from dparallel.models.checkpoints import save_model
from dparallel.stages.manifest import MANIFEST, StageError, fingerprint
from dparallel.trajectories.schema import ForeignShardError
from tests.conftest import random_model
from tests.dparallel.distillation.conftest import (
    NO_GPU,
    curve,
    read_metrics,
    run,
    run_forked,
    run_plan,
    write_plan,
)


@pytest.mark.usefixtures("one_process")
def test_trajectories_of_another_teacher_are_refused(
    tiny_checkpoint: Path, trajectories: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    save_model(random_model(seed=1), other)
    plan, out = write_plan(tmp_path, other, trajectories)
    with pytest.raises(StageError, match="were recorded by another teacher") as error:
        run_plan(plan)
    for named in (trajectories, fingerprint(tiny_checkpoint)[:12], other, fingerprint(other)[:12]):
        assert str(named) in str(error.value)
    assert not out.exists()


@pytest.mark.usefixtures("one_process")
def test_folders_that_hold_no_trajectories_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "recorded"
    plan, out = write_plan(tmp_path, tiny_checkpoint, folder)
    with pytest.raises(StageError, match=f"{folder}: no such trajectories folder"):
        run_plan(plan)
    folder.mkdir()
    with pytest.raises(StageError, match=f"{folder} holds no finished trajectories"):
        run_plan(plan)
    pq.write_table(pa.table({"text": ["a"]}), folder / "foreign.parquet")
    with pytest.raises(ForeignShardError, match=r"foreign\.parquet is not a trajectory shard: no column"):
        run_plan(plan)
    assert not out.exists()


@pytest.mark.slow
def test_a_second_training_of_a_folder_leaves_the_first_alone(
    tiny_checkpoint: Path, trajectories: Path, tmp_path: Path
) -> None:
    def start_another(train_step: int) -> None:
        if train_step == 6:
            other = tmp_path / "other.json"
            other.write_bytes((tmp_path / "plan.json").read_bytes())
            alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
            code, output = run([sys.executable, "-m", "dparallel.distillation", str(other)], NO_GPU | alone)
            assert code == 2, output
            assert f"error: {out} is in use by process {os.getpid()} on" in output, output
            assert (out / "checkpoints" / "step-00000005").is_dir()
            print("the second one was refused")

    plan, out = write_plan(tmp_path, tiny_checkpoint, trajectories, train_steps=8)
    code, output = run_forked(plan, start_another)
    assert code == 0, output
    assert "the second one was refused" in output
    assert [row[0] for row in curve(out)] == list(range(1, 9))


def test_a_checkpoint_that_finds_no_room_is_named_and_the_older_ones_stay(
    tiny_checkpoint: Path, trajectories: Path, tmp_path: Path
) -> None:
    def fill(train_step: int) -> None:
        if train_step == 8:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    plan, out = write_plan(tmp_path, tiny_checkpoint, trajectories, train_steps=12)
    code, output = run_forked(plan, fill)
    assert code == 2, output
    (said,) = [message for line in output.splitlines() if (message := reported(line)) is not None]
    assert said.startswith(f"{out}/checkpoints/step-00000010 cannot be written (")
    assert "Traceback" not in output
    assert [file.name for file in (out / "checkpoints").glob("*-*")] == ["step-00000005"]


def test_a_diverged_step_is_named_and_nothing_of_it_is_kept(
    tiny_checkpoint: Path, trajectories: Path, tmp_path: Path
) -> None:
    plan, out = write_plan(
        tmp_path,
        tiny_checkpoint,
        trajectories,
        optimizer=OptimizerConfig(learning_rate=1e30),
        checkpoint_every=1,
    )
    code, output = run_forked(plan)
    assert code != 0
    assert "train_step 2: loss" in output
    assert not (out / MANIFEST).exists()
    assert [file.name for file in (out / "checkpoints").glob("*-*")] == ["step-00000001"]
    assert [record["train_step"] for record in read_metrics(out)] == [1]


def test_without_a_launcher_it_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["dparallel.distillation", str(tmp_path / "plan.json")])
    assert main() != 0
    message = capsys.readouterr().err
    assert "torchrun --standalone --nproc_per_node N -m dparallel.distillation PLAN.json" in message
