"""What measurements run on; times are only comparable on the same hardware."""

import platform
from pathlib import Path

import torch


def hardware() -> str:
    """What `load_model` puts a model on; timings are only comparable on the same."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{cpu_name()}, threads: {torch.get_num_threads()}"


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"{platform.machine()} CPU"
