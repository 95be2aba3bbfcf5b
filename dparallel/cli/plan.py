"""`dparallel plan`: what an experiment needs, as text, and a refusal where it cannot fit."""

import re
from collections.abc import Mapping, Sequence

import torch
from tabulate import tabulate

from dparallel.config.base import ConfigError
from dparallel.config.experiment import DistillConfig
from dparallel.config.files import load_config
from dparallel.preflight.checks import check_experiment
from dparallel.preflight.disk import free_disk
from dparallel.preflight.memory import RESERVED
from dparallel.preflight.plan import Plan, check_fits, make_plan
from dparallel.preflight.rate import Rate, measure_rate
from dparallel.preflight.units import size, sizes

UNITS = {"MB": 2**20, "GB": 2**30, "MIB": 2**20, "GIB": 2**30}  # of a GPU's memory GB means GiB
Row = Sequence[str]


def print_plan(
    config: str, overrides: list[str], gpu_memory: str | None, tokens_per_second: float | None
) -> None:
    """Print what the experiment needs.

    Raises:
        UserError: it does not fit, after it was printed, or a setting makes no sense.
    """
    gpu_bytes = _gpu_bytes(gpu_memory)
    settings = load_config(DistillConfig, config, overrides)
    plan = make_plan(settings, check_experiment(settings), on_gpu=gpu_bytes is not None)
    disk = free_disk(plan.config.runs)
    rate: Rate | None = None
    unknown = "The teacher is not here, or does not fit into this machine"
    if tokens_per_second is not None:
        rate = Rate(tokens_per_second, "as given by --rate")
    elif gpu_bytes is not None and not torch.cuda.is_available():
        unknown = "There is no GPU here to measure on, and a CPU's rate tells nothing about a GPU's"
    else:
        rate = measure_rate(plan)
    sections = [
        _head(plan),
        _memory(plan, gpu_bytes),
        f"Still to be written, in {plan.config.runs}\n{_bytes_table(plan.disk)}\n{size(disk)} are free there",
        _forwards(plan, rate, unknown),
    ]
    print("\n\n".join(sections), flush=True)
    check_fits(plan, gpu_bytes, disk)


def _gpu_bytes(given: str | None) -> int | None:
    """What was given, else that of the smallest GPU here; None without any."""
    if given is None:
        gpus = range(torch.cuda.device_count())
        return min((torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus), default=None)
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MG]i?B)", given, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ConfigError(
            f"--gpu-memory {given}: give a number and its unit, such as 24GB (a GB is 2**30 bytes)"
        )
    return int(float(found[1]) * UNITS[found[2].upper()])


def _head(plan: Plan) -> str:
    training, shape = plan.config.training, plan.shape
    base = training.quantization or shape.precision
    return (
        f"{plan.config.name}: teacher {plan.config.teacher}, {plan.parameters:,} parameters; "
        f"LoRA rank {training.lora.rank} trains {plan.trainable:,}\n"
        f"Training in {shape.precision}, base weights in {base}, {shape.processes} processes, canvases of at "
        f"most {shape.length} tokens"
    )


def _memory(plan: Plan, gpu_bytes: int | None) -> str:
    """Training, decoding and the limit in one column, so that they compare."""
    rows: dict[str, int] = {}
    if plan.training is not None:
        rows |= {f"training: {kind}": held for kind, held in plan.training.kinds().items()}
        rows["training: peak"] = plan.training.peak
    rows |= {f"decoding: {kind}": held for kind, held in plan.decoding.kinds().items()}
    rows["decoding: peak"] = plan.decoding.peak
    dtype = str(plan.decoding.dtype).removeprefix("torch.")
    notes = {
        "training: peak": "activations and update are never held together",
        "decoding: peak": f"in {dtype}, of one row; as many rows go together as fit",
    }
    last = "There is no GPU here, so everything runs on the CPU; --gpu-memory 24GB plans for one"
    if gpu_bytes is not None:
        last = f"Limit of each GPU: {size(gpu_bytes - RESERVED)} of its {size(gpu_bytes)}"
    done = "" if plan.training is not None else "Training needs nothing: every student is trained\n"
    return f"On each GPU\n{done}{_bytes_table(rows, notes)}\n{last}"


def _forwards(plan: Plan, rate: Rate | None, unknown: str) -> str:
    stages = plan.forwards.items()
    head = "Rows through the model, at most: thresholds are taken to commit one token per forward"
    if rate is None:
        table = _table([[stage, f"{forwards.rows:,}"] for stage, forwards in stages])
        return f"{head}\n{table}\n{unknown}: hours need --rate N, the tokens/s that a GPU reads"
    rows = [[stage, f"{part.rows:,}", f"{rate.hours([part]):.2f} hours at most"] for stage, part in stages]
    total = f"{rate.hours(plan.forwards.values()):.2f} hours at most"
    table = _table([*rows, ["together", "", total]])
    return f"{head}\n{table}\nof one device at {rate.tokens_per_second:,.0f} tokens/s, {rate.origin}"


def _bytes_table(counts: Mapping[str, int], notes: Mapping[str, str] | None = None) -> str:
    texts = sizes(list(counts.values()))
    return _table(
        [[kind, text, (notes or {}).get(kind, "")] for kind, text in zip(counts, texts, strict=True)]
    )


def _table(rows: Sequence[Row]) -> str:
    """Names on the left, numbers on the right, notes after them."""
    text = tabulate(rows, tablefmt="plain", colalign=("left", "right"), disable_numparse=True)
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())
