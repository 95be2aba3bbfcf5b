"""Starts training in processes of its own, follows it, and leaves none of them behind."""

import contextlib
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
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch

from dparallel.config import LaunchConfig
from dparallel.experiment import StagePlan

TARGET = "dparallel.distillation"
LAST_LINES = 40
# Where a launcher starts to report that a process failed; what matters was printed before.
LAUNCHERS_REPORT = re.compile(r"torch/distributed/elastic/.*failed \(exitcode|launch\.py:\d+:sigkill_handler")
GRACE_SECONDS = 10.0


class LaunchError(RuntimeError):
    """Training ended with a failure; the message carries its exit code and last lines."""


def launch(
    plan: StagePlan,
    config: LaunchConfig,
    on_line: Callable[[str], None],
    on_tick: Callable[[], None],
    target: str = TARGET,
    tick_seconds: float = 2.0,
) -> None:
    """Run `plan` to its end. Whatever ends this call ends every process it started.

    Args:
        on_line: receives each line that the processes print.
        on_tick: called about every `tick_seconds` and once at the end.
        target: the module that every process runs, with the plan's file as its argument.

    Raises:
        LaunchError: the launcher's exit code is not 0.
    """
    plan_file = write_plan(plan)
    with _processes([*command(config, target), str(plan_file)], environment(config)) as process:
        last = _follow(process, on_line, on_tick, tick_seconds)
        code = process.wait()
    on_tick()
    if code != 0:
        raise LaunchError(f"training ended with exit code {code}; its last lines:\n" + "\n".join(last))


def write_plan(plan: StagePlan) -> Path:
    """The plan as a file beside the stage's folder, which stays the stage's own."""
    path = Path(plan.out_dir + ".plan.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(plan.model_dump_json(indent=1))
    return path


def command(config: LaunchConfig, target: str = TARGET) -> list[str]:
    """The command line up to the plan's file, always with this very Python."""
    if config.launcher == "deepspeed":
        return [
            *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(config.processes)),
            *("--master_port", str(_free_port()), "--no_local_rank", "--module", target),
        ]
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--standalone", "--nproc_per_node", str(config.processes), "-m", target),
    ]


def environment(config: LaunchConfig) -> dict[str, str]:
    """This process's environment; without a GPU, DeepSpeed on the CPU and the cores shared out."""
    extra = {"PYTHONUNBUFFERED": "1"}
    if not torch.cuda.is_available():
        threads = max(1, len(os.sched_getaffinity(0)) // config.processes)
        extra |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    return {**os.environ, **extra}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def _processes(arguments: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen]:
    if setpriv := shutil.which("setpriv"):  # Linux: training ends even if this process is killed outright
        arguments = [setpriv, "--pdeathsig", "TERM", *arguments]
    process = subprocess.Popen(
        arguments,
        env=env,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        _stop(process)


def _follow(
    process: subprocess.Popen,
    on_line: Callable[[str], None],
    on_tick: Callable[[], None],
    tick_seconds: float,
) -> list[str]:
    """Hand on lines until the output ends; returns the last that are not the launcher's own."""
    assert process.stdout is not None
    output = process.stdout
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in output:
            lines.put(line.rstrip("\n"))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    last: deque[str] = deque(maxlen=LAST_LINES)
    reporting = False
    next_tick = time.monotonic() + tick_seconds
    while True:
        with contextlib.suppress(queue.Empty):
            line = lines.get(timeout=max(0.0, next_tick - time.monotonic()))
            if line is None:
                return list(last)
            reporting = reporting or LAUNCHERS_REPORT.search(line) is not None
            if not reporting:
                last.append(line)
            on_line(line)
        if time.monotonic() >= next_tick:
            on_tick()
            next_tick = time.monotonic() + tick_seconds


def _stop(process: subprocess.Popen) -> None:
    """End the launcher and all its descendants: it puts workers in sessions of their own."""
    try:
        family = [each := psutil.Process(process.pid), *each.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=GRACE_SECONDS)
    for each in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
