"""How many threads torch computes with on a CPU: as many as help a model of its size and batch.

The threads wait for each other after every operation. With many of them, a small model computes for
microseconds between two waits; and where other programs use the CPUs, each wait takes as long as the slowest
thread is kept from its CPU, so that a forward pass of milliseconds takes seconds.

Commands and stages use `fitting_threads`, which restores the number. The library's functions (`generate`,
`complete`) leave it alone: it belongs to the program that calls them.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

log = logging.getLogger(__name__)

PARAMETERS_PER_THREAD = 5_000_000
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # read by torch when it is imported


@contextlib.contextmanager
def fitting_threads(model: torch.nn.Module, rows: int = 1) -> Iterator[None]:
    """Compute with a number of threads that fits a model on a CPU, and restore the number at the end.

    A number that the environment (`OMP_NUM_THREADS`) or `torch.set_num_threads` has set is kept.

    Args:
        rows: batch size.
    """
    before = torch.get_num_threads()
    weight = next(model.parameters(), None)
    parameters, cores = sum(weight.numel() for weight in model.parameters()), usable_cores()
    threads = threads_for(parameters, cores, rows)
    if weight is None or weight.device.type != "cpu" or is_chosen(before) or threads == before:
        yield
        return
    say(threads, cores, parameters, rows)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_for(parameters: int, cores: int, rows: int = 1) -> int:
    """A thread for every `PARAMETERS_PER_THREAD` parameters and row, and one for each core at most."""
    return max(1, min(cores, -(-parameters * rows // PARAMETERS_PER_THREAD)))


@functools.cache
def say(threads: int, cores: int, parameters: int, rows: int) -> None:
    """Log the number of threads and the reason, once in a process."""
    log.info(
        "computing with %d of %d CPU cores, which fits a model of %.2g M parameters at batch size %d "
        "(OMP_NUM_THREADS sets another number)",
        threads,
        cores,
        parameters / 1e6,
        rows,
    )


def is_chosen(threads: int) -> bool:
    """Whether a user chose this number of threads, which is then none of torch's own choices."""
    if any(os.environ.get(name) for name in VARIABLES):
        return True
    return threads not in {os.cpu_count(), psutil.cpu_count(logical=False), *_cores()}


def usable_cores() -> int:
    """Physical cores that this process may use, according to its affinity and its control group's quota."""
    _, physical = _cores()
    quota = _quota()
    return max(1, physical if quota is None else min(physical, int(quota)))


def _cores() -> tuple[int, int]:
    """Logical and physical cores in the affinity of this process."""
    logical = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = set()
    for cpu in logical:
        file = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            siblings.add(file.read_text(encoding="utf-8").strip())
        except OSError:
            siblings.add(str(cpu))
    return len(logical), len(siblings)


def _quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """CPUs' worth of time that the control group of a container may use; None if it is not limited."""
    with contextlib.suppress(OSError, ValueError):  # version 2
        limit, period = (root / "cpu.max").read_text(encoding="utf-8").split()
        return None if limit == "max" else int(limit) / int(period)
    with contextlib.suppress(OSError, ValueError):  # version 1
        limit = (root / "cpu" / "cpu.cfs_quota_us").read_text(encoding="utf-8")
        period = (root / "cpu" / "cpu.cfs_period_us").read_text(encoding="utf-8")
        return None if int(limit) < 0 else int(limit) / int(period)
    return None
