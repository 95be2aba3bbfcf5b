"""Run training in separate processes: start them, forward their output, and always stop them."""

import contextlib
import logging
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil
import torch

from dparallel.config.base import ConfigError, UserError
from dparallel.config.experiment import LaunchConfig, TrainingConfig
from dparallel.distillation.data import step_shape
from dparallel.distillation.errors import PROGRAM, reported
from dparallel.distillation.hosts import is_this_machine, read_hostfile, world_size
from dparallel.models.sizes import parameters_of
from dparallel.models.threads import threads_for, usable_cores
from dparallel.stages.experiment import StagePlan
from dparallel.stages.files import write_atomically

log = logging.getLogger("dparallel.launch")

LAST_LINES = 40
# Lines with which launchers begin to report a failed process; the relevant output was printed before.
LAUNCHERS_REPORT = re.compile(r"torch/distributed/elastic/.*failed \(exitcode|launch\.py:\d+:sigkill_handler")
# The signal that ended a process, in the reports of torch's and of DeepSpeed's launcher.
SIGNAL = re.compile(r"(?:failed \(exitcode: |exits with return code = )-(\d+)")
GRACE_SECONDS = 5.0  # less than `flows.interruption.SECONDS`


class TrainingFailed(RuntimeError):
    """Training failed; the message contains its exit code and last lines of output."""


class TrainingEnded(UserError):
    """A training process was ended from outside; the message names the signal and the remedy."""


class TrainingRefused(UserError):
    """A training process ended with a user's error, whose message this is."""


def launch(
    plan: StagePlan,
    config: LaunchConfig,
    on_line: Callable[[str], None],
    on_tick: Callable[[], None],
    target: str = PROGRAM,
    tick_seconds: float = 2.0,
) -> None:
    """Run the training stage `plan` to its end. All processes end with this call, even after an error.

    Args:
        on_line: called with each line that the processes print, up to a user's error.
        on_tick: called about every `tick_seconds`, and once at the end.
        target: module that every process runs, with the plan's file as argument.

    Raises:
        TrainingRefused: a process ended with a user's error.
        TrainingEnded: a process was ended by a signal.
        TrainingFailed: the launcher's exit code is not 0 for another reason.
    """
    plan_file = write_plan(plan)
    env = environment(config, plan.inputs.get("teacher"))
    with _processes([*command(config, target), str(plan_file)], env) as (process, family):
        last, mistakes, number = _follow(process, family, on_line, on_tick, tick_seconds)
        code = process.wait()
        if code < 0 and number is None:  # the launcher itself
            number = -code
    on_tick()
    if code != 0 and mistakes:
        raise TrainingRefused("; ".join(mistakes))
    if number is not None:
        raise TrainingEnded(_who_ended_it(number))
    if code != 0:
        raise TrainingFailed(f"training ended with exit code {code}; its last lines:\n" + "\n".join(last))


def _who_ended_it(number: int) -> str:
    why = ": the system does that when memory runs out" if number == signal.SIGKILL else ""
    return (
        f"a training process was ended by {signal.Signals(number).name} (signal {number}){why}. Checkpoints "
        "are kept: give the same command again to go on from the last one"
    )


def fit_to_gpus(config: LaunchConfig, training: TrainingConfig, views: int, gpus: int) -> LaunchConfig:
    """`config` with at most one process per GPU, and a number of processes that divides a train step.

    Without GPUs, the number of processes is not limited. The slots of a hostfile are not changed.
    """
    if gpus == 0 or config.hostfile is not None or config.processes <= gpus:
        return config
    processes = next((count for count in range(gpus, 1, -1) if _divides(training, views, count)), 1)
    log.info("%d GPUs here: %d processes instead of %d", gpus, processes, config.processes)
    return config.model_copy(update={"processes": processes})


def _divides(training: TrainingConfig, views: int, processes: int) -> bool:
    try:
        step_shape(training, views, processes)
    except ConfigError:
        return False
    return True


def write_plan(plan: StagePlan) -> Path:
    """Write the plan to a file next to the stage's folder; the folder itself belongs to the stage."""
    path = Path(plan.out_dir + ".plan.json")
    write_atomically(path, plan.model_dump_json(indent=1))
    return path


def command(config: LaunchConfig, target: str = PROGRAM) -> list[str]:
    """The launcher's command line without the plan's file, using the running Python interpreter."""
    if config.launcher == "deepspeed":
        return [
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            *_where(config),
            "--master_port",
            str(_free_port()),
            "--no_local_rank",
            "--module",
            target,
        ]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(config.processes),
        "-m",
        target,
    ]


def _where(config: LaunchConfig) -> list[str]:
    """The deepspeed launcher's options for machines and slots."""
    if config.hostfile is None:
        return ["--num_gpus", str(config.processes)]
    hostfile = ["--hostfile", config.hostfile]
    if is_this_machine(read_hostfile(config.hostfile)):
        return [*hostfile, "--no_ssh_check", "--master_addr", "127.0.0.1"]
    return [*hostfile, "--force_multi"]  # otherwise a single remote machine's processes would run here


def environment(config: LaunchConfig, teacher: str | None = None) -> dict[str, str]:
    """Environment of the launcher; without GPUs, DeepSpeed uses the CPU, and processes share its cores.

    Each process has as many threads as fit the size of `teacher`.
    Python processes read and write UTF-8 in any locale, as `_processes` expects.
    """
    extra = {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}
    if not torch.cuda.is_available():
        cores = max(1, usable_cores() // world_size(config))
        threads = cores if teacher is None else threads_for(parameters_of(teacher), cores)
        extra |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    return {**os.environ, **extra}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ending_with_this_process(arguments: list[str]) -> list[str]:
    """A command line that gets SIGTERM when this process ends, even by SIGKILL (on Linux).

    Precisely, when the thread ends that starts it.
    """
    setpriv = shutil.which("setpriv")
    return arguments if setpriv is None else [setpriv, "--pdeathsig", "TERM", *arguments]


@contextlib.contextmanager
def _processes(
    arguments: list[str], env: dict[str, str]
) -> Iterator[tuple[subprocess.Popen, set[psutil.Process]]]:
    """Start a launcher; yields it and a set for its descendants, all of which are stopped at exit."""
    process = subprocess.Popen(
        ending_with_this_process(arguments),
        env=env,
        encoding="utf-8",
        errors="replace",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    family: set[psutil.Process] = set()
    try:
        yield process, family
    finally:
        _stop(process, family)


def _follow(
    process: subprocess.Popen,
    family: set[psutil.Process],
    on_line: Callable[[str], None],
    on_tick: Callable[[], None],
    tick_seconds: float,
) -> tuple[list[str], list[str], int | None]:
    """Forward lines until the output ends.

    Returns the last lines that are not the launcher's own, the messages of users' errors, which several
    processes may report, and the signal that ended a process first, if one did. After a user's error, nothing
    is forwarded: the launcher only reports the failure.

    Workers that survive a killed launcher keep the output open; it then ends at the first tick without a
    line.
    """
    assert process.stdout is not None
    output = process.stdout
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        with output:
            for line in output:
                lines.put(line.rstrip("\n"))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    last: deque[str] = deque(maxlen=LAST_LINES)
    mistakes: dict[str, None] = {}
    reporting = ended = False
    number: int | None = None
    next_tick = time.monotonic() + tick_seconds
    while True:
        with contextlib.suppress(queue.Empty):
            line = lines.get(timeout=max(0.0, next_tick - time.monotonic()))
            if line is None:
                break
            if (mistake := reported(line)) is not None:
                mistakes[mistake] = None
            reporting = reporting or LAUNCHERS_REPORT.search(line) is not None
            if number is None and (report := SIGNAL.search(line)) is not None:
                number = int(report.group(1))
            if not reporting:
                last.append(line)
            if not mistakes:
                on_line(line)
        if time.monotonic() >= next_tick:
            on_tick()
            if ended and lines.empty():
                break
            family |= _descendants(process)
            ended = process.poll() is not None
            next_tick = time.monotonic() + tick_seconds
    return list(last), list(mistakes), number


def _descendants(process: subprocess.Popen) -> set[psutil.Process]:
    """Descendants of a process; empty if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return set(psutil.Process(process.pid).children(recursive=True))
    return set()


def _stop(process: subprocess.Popen, family: set[psutil.Process]) -> None:
    """Stop the launcher, its descendants and the remembered ones, which have sessions of their own."""
    family |= _descendants(process)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)  # the launcher stops its workers
        family.add(psutil.Process(process.pid))
    else:
        _end(family, psutil.Process.terminate)
    _, alive = psutil.wait_procs(family, timeout=GRACE_SECONDS)
    _end(alive, psutil.Process.kill)
    process.wait()


def _end(processes: Iterable[psutil.Process], end: Callable[[psutil.Process], None]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            end(process)
