import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from dparallel.config.experiment import LaunchConfig, OptimizerConfig, TrainingConfig
from dparallel.stages.experiment import StagePlan
from tasks.launch import (
    TrainingEnded,
    TrainingFailed,
    TrainingRefused,
    command,
    environment,
    fit_to_gpus,
    launch,
)

CHILD = "tests.tasks.child"


def plan_in(folder: Path, ends: str) -> StagePlan:
    return StagePlan(stage="training", config={"ends": ends}, inputs={}, out_dir=str(folder / "training"))


def on_hosts(folder: Path, text: str) -> LaunchConfig:
    (folder / "hosts").write_text(text, encoding="utf-8")
    return LaunchConfig(launcher="deepspeed", hostfile=str(folder / "hosts"))


def children_in(folder: Path, count: int) -> list[int]:
    """The process ids of `count` children, when all of them have started."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        written = [path.read_text(encoding="utf-8") for path in folder.glob("training/pid-*")]
        if len(written) == count and all(written):
            return [int(text) for text in written]
        time.sleep(0.05)
    raise AssertionError(f"{count} children did not start")


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 15
    while any(map(psutil.pid_exists, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_every_process_gets_the_plan_and_its_lines_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In UTF-8 in any locale."""
    for name, value in {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}.items():
        monkeypatch.setenv(name, value)
    lines: list[str] = []
    ticks: list[int] = []
    config = LaunchConfig(processes=2)
    launch(plan_in(tmp_path, "well"), config, lines.append, lambda: ticks.append(len(lines)), CHILD)
    text = "\n".join(lines)
    assert "rank 0 of 2 → " in text
    assert "rank 1 of 2 → " in text
    assert ticks[-1] == len(lines), "a last tick comes after the last line"


@pytest.mark.slow
def test_a_hostfile_of_this_machine_starts_its_slots_here(tmp_path: Path) -> None:
    """A launch by DeepSpeed's launcher."""
    lines: list[str] = []
    launch(
        plan_in(tmp_path, "well"), on_hosts(tmp_path, "localhost slots=2"), lines.append, lambda: None, CHILD
    )
    text = "\n".join(lines)
    assert "rank 0 of 2" in text
    assert "rank 1 of 2" in text


@pytest.mark.parametrize("hosts", ["node-b slots=2", "node-a slots=2\nnode-b slots=2"])
def test_other_machines_are_reached_by_the_deepspeed_launcher(tmp_path: Path, hosts: str) -> None:
    """DeepSpeed must be forced to use a single remote machine; otherwise its processes would run here."""
    line = command(on_hosts(tmp_path, hosts))
    hostfile = str(tmp_path / "hosts")
    assert line[1:6] == ["-m", "deepspeed.launcher.runner", "--hostfile", hostfile, "--force_multi"]
    assert line[-2:] == ["--module", "dparallel.distillation"]
    assert "--num_gpus" not in line, "the slots say"


def test_failure_carries_exit_code_and_last_lines(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match="exit code 1") as error:
        launch(plan_in(tmp_path, "badly"), LaunchConfig(), lambda line: None, lambda: None, CHILD)
    assert str(error.value).endswith("ValueError: the loss is not a number at train_step 7")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_users_error_in_a_process_is_one_line_without_the_launchers_report(
    tmp_path: Path, launcher: str
) -> None:
    """Two processes report it, and the launcher adds a traceback of its own."""
    lines: list[str] = []
    config = LaunchConfig(processes=2) if launcher == "torchrun" else on_hosts(tmp_path, "localhost slots=2")
    with pytest.raises(TrainingRefused) as error:
        launch(plan_in(tmp_path, "refused"), config, lines.append, lambda: None, CHILD)
    assert str(error.value) == f"{tmp_path}/training is in use by process 7"
    text = "\n".join(lines)
    assert "in use" not in text, "the caller reports it"
    assert "exitcode" not in text
    assert "Traceback" not in text


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_process_that_is_killed_is_named_with_its_signal(tmp_path: Path, launcher: str) -> None:
    config = LaunchConfig(processes=2) if launcher == "torchrun" else on_hosts(tmp_path, "localhost slots=2")
    with pytest.raises(TrainingEnded) as error:
        launch(plan_in(tmp_path, "killed"), config, lambda line: None, lambda: None, CHILD)
    assert str(error.value).startswith(
        "a training process was ended by SIGKILL (signal 9): the system does that when memory runs out. "
    )
    assert gone(children_in(tmp_path, 2))


def test_an_exception_stops_every_process(tmp_path: Path) -> None:
    def stop_once_started() -> None:
        children_in(tmp_path, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch(
            plan_in(tmp_path, "never"),
            LaunchConfig(processes=2),
            lambda line: None,
            stop_once_started,
            CHILD,
            tick_seconds=0.1,
        )
    assert gone(children_in(tmp_path, 2))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_lines_arrive_while_training_runs(tmp_path: Path, launcher: str) -> None:
    lines: list[str] = []

    def stop_after_a_line() -> None:
        if any("rank 0 of" in line for line in lines):
            raise KeyboardInterrupt  # training would run on for minutes

    config = LaunchConfig(processes=2) if launcher == "torchrun" else on_hosts(tmp_path, "localhost slots=2")
    with pytest.raises(KeyboardInterrupt):
        launch(plan_in(tmp_path, "never"), config, lines.append, stop_after_a_line, CHILD, tick_seconds=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_caller_leaves_no_process_behind(tmp_path: Path, signal_number: int) -> None:
    code = (
        "import signal, sys, pathlib\n"
        "from tests.tasks.test_launch import *\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n"
        "launch(plan_in(pathlib.Path(sys.argv[1]), 'never'), LaunchConfig(), print, lambda: None, CHILD)\n"
    )
    caller = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.DEVNULL)
    children = children_in(tmp_path, 1)
    os.kill(caller.pid, signal_number)
    caller.wait(30)
    assert gone(children)


@pytest.mark.slow
def test_a_killed_launcher_ends_training_and_its_workers(tmp_path: Path) -> None:
    """Its workers, in their own sessions, survive and keep the output open."""
    ticks = 0

    def kill_the_launcher() -> None:
        nonlocal ticks
        ticks += 1
        children = children_in(tmp_path, 2)
        if ticks != 2:  # workers are remembered between ticks
            return
        (workers_launcher,) = {psutil.Process(child).ppid() for child in children}
        (own,) = (
            each
            for each in psutil.Process().children()
            if each.status() != "zombie" and str(tmp_path) in str(each.cmdline())
        )
        for pid in {workers_launcher, own.pid}:
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(TrainingEnded, match="was ended by SIGKILL"):
        launch(
            plan_in(tmp_path, "never"),
            LaunchConfig(processes=2),
            lambda line: None,
            kill_the_launcher,
            CHILD,
            tick_seconds=0.5,
        )
    assert gone(children_in(tmp_path, 2))


@pytest.mark.parametrize(
    ("asked", "gpus", "views_per_step", "given"),
    [(2, 0, 64, 2), (2, 1, 64, 1), (2, 2, 64, 2), (8, 6, 64, 4), (8, 16, 64, 8), (9, 5, 18, 3)],
)
def test_there_is_a_gpu_for_every_process(asked: int, gpus: int, views_per_step: int, given: int) -> None:
    training = TrainingConfig(
        optimizer=OptimizerConfig(learning_rate=1e-3), train_steps=1, views_per_step=views_per_step
    )
    assert fit_to_gpus(LaunchConfig(processes=asked), training, 2, gpus).processes == given


def test_a_hostfiles_slots_are_not_this_machines_gpus(tmp_path: Path) -> None:
    training = TrainingConfig(optimizer=OptimizerConfig(learning_rate=1e-3), train_steps=1)
    config = on_hosts(tmp_path, "node-a slots=8\nnode-b slots=8")
    assert fit_to_gpus(config, training, 2, gpus=1) == config


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
def test_cores_are_shared_out_without_a_gpu(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("tasks.launch.usable_cores", lambda: 8)
    shared = environment(LaunchConfig(processes=4))
    assert (shared["DS_ACCELERATOR"], shared["OMP_NUM_THREADS"]) == ("cpu", "2")
    assert environment(LaunchConfig(processes=16))["OMP_NUM_THREADS"] == "1"
    assert environment(LaunchConfig(processes=2), str(tiny_checkpoint))["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert environment(LaunchConfig(processes=4))["OMP_NUM_THREADS"] == "3", "what the user set stays"


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_the_launcher_starts_as_many_processes_as_asked(launcher: str) -> None:
    line = command(LaunchConfig(launcher=launcher, processes=3))
    option = {"torchrun": "--nproc_per_node", "deepspeed": "--num_gpus"}[launcher]
    assert line[line.index(option) + 1] == "3"
    assert line[-1] == "dparallel.distillation"
