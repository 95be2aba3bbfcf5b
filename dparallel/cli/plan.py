"""`dparallel plan`: what an experiment needs, as text, and a refusal where it cannot fit."""

import re

import torch

from dparallel.config.base import ConfigError
from dparallel.config.experiment import DistillConfig
from dparallel.config.files import load_config
from dparallel.preflight.checks import check_inputs
from dparallel.preflight.disk import free_disk
from dparallel.preflight.plan import RESERVED, Plan, check_fits, make_plan, size
from dparallel.preflight.rate import Rate, measure_rate

UNITS = {"MB": 2**20, "GB": 2**30, "MIB": 2**20, "GIB": 2**30}  # of a GPU's memory GB means GiB


def print_plan(
    config: str, overrides: list[str], gpu_memory: str | None, tokens_per_second: float | None
) -> None:
    """Print what the experiment needs.

    Raises:
        ConfigError: it does not fit, after it was printed, or a setting makes no sense.
    """
    gpu_bytes = _gpu_bytes(gpu_memory)
    try:
        settings = load_config(DistillConfig, config, overrides)
        plan = make_plan(settings, check_inputs(settings), on_gpu=gpu_bytes is not None)
    except ValueError as error:  # every check's own kind
        raise ConfigError(str(error)) from error
    disk = free_disk(plan.config.runs)
    rate: Rate | None = None
    unknown = "The teacher is not here, or does not fit into this machine"
    if tokens_per_second is not None:
        rate = Rate(tokens_per_second, "as given by --rate")
    elif gpu_bytes is not None and not torch.cuda.is_available():
        unknown = "No GPU here to measure on, and a CPU's rate says nothing of one"
    else:
        rate = measure_rate(plan)
    print("\n".join(_lines(plan, gpu_bytes, disk, rate, unknown)), flush=True)
    check_fits(plan, gpu_bytes, disk)


def _gpu_bytes(given: str | None) -> int | None:
    """What was given, else that of the smallest GPU here; None without any."""
    if given is None:
        devices = range(torch.cuda.device_count())
        return min((torch.cuda.get_device_properties(each).total_memory for each in devices), default=None)
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MG]i?B)", given, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ConfigError(f"--gpu-memory {given}: give a number and its unit, such as 24GB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def _lines(plan: Plan, gpu_bytes: int | None, disk: int, rate: Rate | None, unknown: str) -> list[str]:
    training = plan.config.training
    base = training.quantization or plan.precision
    lines = [
        f"{plan.config.name}: teacher {plan.config.teacher}, {plan.parameters:,} parameters; "
        f"LoRA rank {training.lora.rank} trains {plan.trainable:,}",
        f"Training in {plan.precision}, base weights in {base}, {plan.processes} processes, canvases of at "
        f"most {plan.length} tokens",
        "",
        *("On each GPU, in training", *_training(plan)),
        *(
            "",
            f"On each GPU, recording and measuring in {plan.decoding.dtype}",
            *_table(plan.decoding.kinds()),
        ),
        f"  {'peak':16}{size(plan.decoding.peak):>16}  as many rows go together as fit",
        "",
    ]
    if gpu_bytes is None:
        lines.append("No GPU here: everything runs on the CPU; --gpu-memory 24GB plans for one")
    else:
        lines.append(f"{'Limit of each':18}{size(gpu_bytes - RESERVED):>16}  of {size(gpu_bytes)}")
    lines += [
        *("", f"Still to be written, in {plan.config.runs}"),
        *_table(plan.disk),
        *(f"  {'free':16}{size(disk):>16}", "", "Forwards of a row, at most"),
    ]
    for stage, work in plan.work.items():
        hours = "" if rate is None else f"{rate.hours([work]):>12.2f} hours"
        lines.append(f"  {stage:16}{work.forwards:>16,}{hours}")
    if rate is None:
        lines.append(f"  {unknown}: hours need --rate N, the tokens/s that a GPU reads")
    else:
        total = rate.hours(plan.work.values())
        lines.append(
            f"  {total:.2f} hours of one device at {rate.tokens_per_second:,.0f} tokens/s, {rate.origin}"
        )
    return lines


def _training(plan: Plan) -> list[str]:
    if plan.memory is None:
        return ["  nothing: every student is trained"]
    peak = f"  {'peak':16}{size(plan.memory.peak):>16}  activations and update do not meet"
    return [*_table(plan.memory.kinds()), peak]


def _table(sizes: dict[str, int]) -> list[str]:
    return [f"  {name:16}{size(count):>16}" for name, count in sizes.items()]
