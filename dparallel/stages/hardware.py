"""The hardware that results are made on."""

import platform
from pathlib import Path

import torch


def hardware() -> str:
    """The device that `load_model` uses by default; timings are comparable only on the same hardware."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{cpu_name()}, threads: {torch.get_num_threads()}"


def cpu_name() -> str:
    """Model name of the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"{platform.machine()} CPU"
