"""`dparallel plan`: print what an experiment needs, with an error if it does not fit."""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from tabulate import tabulate

from dparallel.config.base import ConfigError
from dparallel.config.experiment import DistillConfig
from dparallel.config.files import load_config
from dparallel.preflight.baselines import baseline_decodings
from dparallel.preflight.checks import check_experiment
from dparallel.preflight.disk import free_disk
from dparallel.preflight.memory import RESERVED
from dparallel.preflight.plan import Plan, check_fits, make_plan
from dparallel.preflight.rate import Rate, measure_rate
from dparallel.preflight.units import size, sizes
from dparallel.stages.storage.inputs import localized

UNITS = {"MB": 2**20, "GB": 2**30, "MIB": 2**20, "GIB": 2**30}  # GPU memory is sold as GB and means GiB
UNCOUNTED = "Not counted: starting the programs, judging the responses, and the report's pictures"
SHORT = "under a minute"
Row = Sequence[str]


def print_plan(
    config: str, overrides: list[str], gpu_memory: str | None, tokens_per_second: float | None
) -> None:
    """Print what the experiment needs.

    Args:
        overrides: `key.sub=value` settings.
        gpu_memory: memory of each GPU, such as "24GB"; by default that of this machine's smallest GPU.
        tokens_per_second: throughput for the estimate of hours; by default it is measured.

    Raises:
        UserError: the experiment does not fit (raised after printing), or settings are invalid.
    """
    gpu_bytes = _gpu_bytes(gpu_memory)
    settings = localized(load_config(DistillConfig, config, overrides))
    if missing := baseline_decodings(settings):
        settings = localized(load_config(DistillConfig, config, [*overrides, *missing]))
    plan = make_plan(settings, check_experiment(settings), on_gpu=gpu_bytes is not None)
    disk = free_disk(plan.config.runs)
    rate: Rate | None = None
    unknown = "The teacher is not available locally, or does not fit into memory"
    if tokens_per_second is not None:
        rate = Rate(tokens_per_second, "as given by --rate")
    elif gpu_bytes is not None and not torch.cuda.is_available():
        unknown = "This machine has no GPU, and the throughput of a CPU does not predict that of a GPU"
    elif _is_left(plan):
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
    """Bytes of `--gpu-memory`, or of the smallest GPU of this machine; None without GPUs."""
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
    processes = "1 process" if shape.processes == 1 else f"{shape.processes} processes"
    return (
        f"{plan.config.name}: teacher {plan.config.teacher}, {plan.parameters:,} parameters; "
        f"LoRA rank {training.lora.rank} trains {plan.trainable:,}\n"
        f"Training in {shape.precision}, base weights in {base}, {processes}, canvases of at "
        f"most {shape.length} tokens"
    )


def _memory(plan: Plan, gpu_bytes: int | None) -> str:
    """Training, decoding and the limit in one column for comparison."""
    rows: dict[str, int] = {}
    if plan.training is not None:
        rows |= {f"training: {kind}": held for kind, held in plan.training.kinds().items()}
        rows["training: peak"] = plan.training.peak
    rows |= {f"decoding: {kind}": held for kind, held in plan.decoding.kinds().items()}
    rows["decoding: peak"] = plan.decoding.peak
    dtype = str(plan.decoding.dtype).removeprefix("torch.")
    notes = {
        "training: weights": "the base model and the adapter",
        "training: optimizer": "of the adapter",
        "training: gradients": "of the adapter",
        "training: gradient buffer": "of a fixed size: reduce_bucket_size of training.deepspeed",
        "training: update": "gradients in float32 during the optimizer step",
        "training: peak": "activations are freed before the update",
        "decoding: peak": f"in {dtype}, with one row; as many rows as fit are decoded together",
    }
    last = "This machine has no GPU, so everything runs on the CPU; use --gpu-memory 24GB to plan for GPUs"
    if gpu_bytes is not None:
        last = f"Limit of each GPU: {size(gpu_bytes - RESERVED)} of its {size(gpu_bytes)}"
    done = "" if plan.training is not None else "All students are trained, so training needs no memory\n"
    return f"On each GPU\n{done}{_bytes_table(rows, notes)}\n{last}"


def _forwards(plan: Plan, rate: Rate | None, unknown: str) -> str:
    if not _is_left(plan):
        return "Everything is finished: no forward passes are left"
    head = (
        "Rows in forward passes that are left: thresholds commit from a block to a token per pass, with no "
        "early end"
    )
    rows = [[stage, *_left(plan, stage, rate)] for stage in plan.forwards]
    if rate is None:
        return f"{head}\n{_table(rows)}\n{unknown}: hours need --rate N, the tokens/s that a GPU reads"
    total = _hours(rate.hours(stages.values()) for stages in (plan.fewest, plan.forwards))
    table = _table([*rows, ["together", "", total, ""]])
    device = f"of one device at {rate.tokens_per_second:,.0f} tokens/s, {rate.origin}"
    return f"{head}\n{table}\n{device}\n{UNCOUNTED}"


def _is_left(plan: Plan) -> bool:
    return any(stage.rows for stage in plan.forwards.values())


def _left(plan: Plan, stage: str, rate: Rate | None) -> Row:
    """Forward passes of a stage, their hours, and what is done."""
    parts = [plan.fewest[stage], plan.forwards[stage]]
    if not parts[1].rows:
        return ["0", "" if rate is None else "none", "finished"]
    rows = _range(f"{part.rows:,}" for part in parts)
    return [
        rows,
        "" if rate is None else _hours(rate.hours([part]) for part in parts),
        plan.done.get(stage, ""),
    ]


def _range(values: Iterable[str]) -> str:
    """The least and the most, or the one value that both are."""
    return " to ".join(dict.fromkeys(values))


def _hours(values: Iterable[float]) -> str:
    text = _range(map(_duration, values))
    return text if text == SHORT else f"{text} hours"


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return SHORT
    return f"{hours:.2g}" if hours < 10 else f"{hours:,.0f}"


def _bytes_table(counts: Mapping[str, int], notes: Mapping[str, str] | None = None) -> str:
    texts = sizes(list(counts.values()))
    return _table(
        [[kind, text, (notes or {}).get(kind, "")] for kind, text in zip(counts, texts, strict=True)]
    )


def _table(rows: Sequence[Row]) -> str:
    """A text table: names on the left, right-aligned numbers, notes."""
    text = tabulate(rows, tablefmt="plain", colalign=("left", "right"), disable_numparse=True)
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())
