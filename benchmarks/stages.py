"""Time and memory of every stage at the size of a published model: one command, one table.

    python -m benchmarks.stages --shape llada-8b             random weights, on a GPU
    python -m benchmarks.stages --shape llada-8b-1000th      the same on a CPU

Saves a checkpoint of random weights with a tokenizer, and problems of random words. Then it runs
trajectories, training (in its own process), merging and benchmark like an experiment. The decoded texts are
meaningless; the result is how long stages take and how much memory they need. Seconds include hashing inputs,
loading the model and writing results.

`peak memory`: on a GPU, the peak of tensors; on a CPU, the peak of resident memory including libraries; for
training, that of its process. `rate`: for trajectories, including loading; for training, canvas tokens of the
last train steps; for the benchmark, tokens of the teacher's reference.
"""

import argparse
import gc
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.common.hardware import describe, peak_memory_bytes, reset_peak_memory, timed, weight_count
from benchmarks.common.shapes import SHAPES, Shape, changed, ignorance, random_model, random_workload
from benchmarks.common.tables import table
from dparallel.config.base import ConfigError
from dparallel.config.experiment import (
    BenchmarkConfig,
    DistillConfig,
    LaunchConfig,
    LoraSettings,
    OptimizerConfig,
    Sweep,
    TrainingConfig,
    TrajectoriesConfig,
)
from dparallel.config.problems import ProblemsConfig, SourceConfig
from dparallel.config.recipe import RecipeConfig
from dparallel.distillation import merging
from dparallel.evaluation import stage as benchmark
from dparallel.models.backbone import DiffusionConfig
from dparallel.models.checkpoints import save_model
from dparallel.models.placement import empty_model
from dparallel.preflight.disk import free_disk
from dparallel.preflight.training_memory import adapter_count
from dparallel.preflight.units import size
from dparallel.stages.experiment import Experiment, StagePlan
from dparallel.stages.manifest import Manifest, verify
from dparallel.stages.streams import set_encodings
from dparallel.trajectories import record
from tasks.launch import launch

Result = TypeVar("Result")
RUNS = Path("runs")
PROBLEMS = 32  # for training, and as many for measuring
VALIDATION_PROBLEMS = 8
TRAIN_STEPS = 20
STUDENT, BENCHMARK = "certainty_forcing", "random_problems"
FASTER = 4  # tokens per forward pass of the sweep relative to the reference


@dataclass(frozen=True)
class Row:
    """A row of the table; `rate` is in `unit` per second."""

    stage: str
    made: str
    seconds: float
    peak_bytes: int
    rate: float | None = None
    unit: str = ""


def model_config(shape: Shape) -> DiffusionConfig:
    """Config of the shape with an EOS token, also used for padding, below the mask token."""
    config = deepcopy(shape.config)
    config.eos_token_id = config.pad_token_id = config.mask_token_id - 1
    config.end_token_ids = (config.eos_token_id,)
    return config


def make_tokenizer(config: DiffusionConfig) -> PreTrainedTokenizerFast:
    """A tokenizer with the words `w0`, `w1`, ... and the two special tokens."""
    names = [f"w{index}" for index in range(config.vocab_size)]
    names[config.eos_token_id], names[config.mask_token_id] = "<eos>", "<mask>"
    words = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, mask_token="<mask>", eos_token="<eos>", pad_token="<eos>"
    )


def write_problems(path: Path, shape: Shape) -> None:
    """Write prompts and references of random words, for training, testing and validation."""
    rng = random.Random(0)
    words = shape.config.mask_token_id - 1

    def text(length: int) -> str:
        return " ".join(f"w{rng.randrange(words)}" for _ in range(length))

    rows = [
        {"prompt": text(shape.prompt_length), "reference": text(shape.gen_length)}
        for _ in range(2 * PROBLEMS + VALIDATION_PROBLEMS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_checkpoint(folder: Path, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
    """Save a model with random weights and its tokenizer."""
    config = model_config(shape)
    save_model(random_model(config, device, dtype), folder, tokenizer=make_tokenizer(config))


def experiment_config(folder: Path, shape: Shape) -> DistillConfig:
    """An experiment with one student as in configs/llada_8b.yaml, with a quarter of its views per step."""

    def problems(rows: str) -> ProblemsConfig:
        source = SourceConfig(path=str(folder / "problems.jsonl"), split=f"train[{rows}]")
        return ProblemsConfig(benchmark="dataset", sources=(source,))

    decoding = random_workload(shape).decoding
    assert decoding.steps is not None
    threshold = ignorance(FASTER * decoding.gen_length / decoding.steps, shape.config.vocab_size)
    faster = changed(decoding, rule="entropy_budget", steps=None, threshold=threshold)
    rank, views = (128, 32) if shape.large else (8, 8)
    return DistillConfig(
        name="pipeline",
        teacher=str(folder / "teacher"),
        runs=str(folder),
        trajectories=TrajectoriesConfig(problems=problems(f":{PROBLEMS}"), decoding=decoding),
        training=TrainingConfig(
            lora=LoraSettings(rank=rank, alpha=rank),
            optimizer=OptimizerConfig(learning_rate=2e-5),
            train_steps=TRAIN_STEPS,
            views_per_step=views,
            micro_batch_size=4,
            only_correct=False,
            gradient_checkpointing=True,
        ),
        students={
            STUDENT: RecipeConfig(
                block_length=shape.block_length, masking="random", complement=True, certainty_weight=2.0
            )
        },
        benchmarks={
            BENCHMARK: BenchmarkConfig(
                test=problems(f"{PROBLEMS}:{2 * PROBLEMS}"),
                validation=problems(f"{2 * PROBLEMS}:"),
                reference=decoding,
                sweeps={"entropy_budget": Sweep(decoding=faster, thresholds=(threshold,))},
                teacher_sweeps=("entropy_budget",),
                student_sweeps=("entropy_budget",),
            )
        },
    )


def check_disk(folder: Path, shape: Shape, dtype: torch.dtype) -> None:
    """Raise a ConfigError if checkpoint, merged model, adapter and last training checkpoint do not fit."""
    lora = experiment_config(folder, shape).training.lora
    adapter = adapter_count(empty_model(shape.config), lora)
    optimizer = 3 * torch.float32.itemsize  # float32 copy of a weight, and two moments
    needed = 2 * dtype.itemsize * (weight_count(shape.config) + adapter) + optimizer * adapter
    if needed > (free := free_disk(folder)):
        raise ConfigError(
            f"{folder} needs {size(needed)} of disk, and {size(free)} are free: free some, or give --folder "
            "on a larger disk"
        )


def run_training(plan: StagePlan, launch_config: LaunchConfig) -> Manifest:
    """Run the training stage in its own process, with its log on stderr."""
    launch(plan, launch_config, lambda line: print(line, file=sys.stderr), lambda: None)
    return verify(plan.out_dir, plan.stage)


def clocked(stage: str, run: Callable[[], Result], device: torch.device) -> tuple[Result, float, int]:
    """Result of `run`, its seconds, and the peak memory of this process in bytes."""
    print(f"{stage} ...", file=sys.stderr)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the training process may need the memory of the previous stage
    reset_peak_memory(device)
    result, seconds = timed(run, device)
    return result, seconds, peak_memory_bytes(device)


def measure(folder: Path, shape: Shape, device: torch.device, dtype: torch.dtype) -> list[Row]:
    """Create checkpoint and problems in `folder`, then run all stages."""
    config = experiment_config(folder, shape)
    experiment = Experiment(config)
    stages: dict[str, Callable[[], Manifest]] = {
        "trajectories": lambda: _run_here(record.run_stage, experiment.trajectories()),
        "training": lambda: run_training(experiment.training(STUDENT), config.launch),
        "merging": lambda: _run_here(merging.run_stage, experiment.merging(STUDENT)),
        "benchmark": lambda: _run_benchmark(experiment.benchmark(BENCHMARK)),
    }
    write_problems(folder / "problems.jsonl", shape)
    _, seconds, peak = clocked(
        "checkpoint", lambda: make_checkpoint(Path(config.teacher), shape, device, dtype), device
    )
    rows = [Row("checkpoint", f"{weight_count(shape.config):,} random weights", seconds, peak)]
    print(finished(rows[-1]), file=sys.stderr)
    for stage, run in stages.items():
        manifest, seconds, peak = clocked(stage, run, device)
        rows.append(stage_row(manifest, seconds, peak))
        print(finished(rows[-1]), file=sys.stderr)  # all is known of it, should a later stage fail
    return rows


def finished(row: Row) -> str:
    """A row of the table in one line."""
    rate = COLUMNS["rate"](row)
    peak = f"peak memory {row.peak_bytes / 2**30:.2f} GiB"
    return ", ".join([f"{row.stage}: {row.made}", f"{row.seconds:.1f} s", peak, *([rate] if rate else [])])


def _run_benchmark(plan: StagePlan) -> Manifest:
    return benchmark.run_stage(plan.settings(), plan.inputs, plan.out_dir, plan.measurements)


def _run_here(run_stage: Callable[..., Manifest], plan: StagePlan) -> Manifest:
    return run_stage(plan.settings(), plan.inputs, plan.out_dir)


def stage_row(manifest: Manifest, seconds: float, peak_bytes: int) -> Row:
    """The row of a stage; `peak_bytes` is that of this process, training's is in its manifest."""
    stage, counts, metrics = manifest.stage, manifest.counts, manifest.metrics
    match stage:
        case "trajectories":
            return Row(
                stage, f"{counts['rows']} rows", seconds, peak_bytes, metrics["rows_per_second"], "rows"
            )
        case "training":
            steps, own_peak = f"{counts['train_steps']} train steps", int(metrics["peak_memory_bytes"])
            return Row(stage, steps, seconds, own_peak, metrics["tokens_per_second"], "tokens")
        case "benchmark":
            made = f"{counts['measurements']} measurements"
            return Row(stage, made, seconds, peak_bytes, metrics["teacher/reference/tps"], "tokens")
    return Row(stage, f"checked on {counts['check_prompts']} prompts", seconds, peak_bytes)


COLUMNS: dict[str, Callable[[Row], str]] = {
    "stage": lambda row: row.stage,
    "made": lambda row: row.made,
    "seconds": lambda row: f"{row.seconds:.1f}",
    "peak memory GiB": lambda row: f"{row.peak_bytes / 2**30:.2f}",
    "rate": lambda row: "" if row.rate is None else f"{row.rate:,.1f} {row.unit}/s",
}


@contextmanager
def scratch(folder: Path | None, keep: bool) -> Iterator[Path]:
    """An empty folder, by default a new one in `runs/`; deleted afterwards unless `keep`."""
    if folder is None:
        RUNS.mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=RUNS, prefix="pipeline-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    set_encodings()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    options = _options(arguments, dtype)
    machine = describe(device)
    print(" · ".join(f"{name}: {value}" for name, value in machine.items()), f"· {dtype}")
    with scratch(options.folder, options.keep) as folder:
        rows = measure(folder, SHAPES[options.shape], device, dtype)
    print(f"\n{options.shape}\n\n{table(rows, COLUMNS, texts=['stage', 'made'])}")
    if options.out:
        record_of_all = {"machine": machine, "shape": options.shape, "rows": [asdict(row) for row in rows]}
        options.out.write_text(json.dumps(record_of_all, indent=1) + "\n", encoding="utf-8")


def _options(arguments: Sequence[str] | None, dtype: torch.dtype) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True, help="of the random weights")
    parser.add_argument("--folder", type=Path, help="working folder (default: a new one in runs/)")
    parser.add_argument("--keep", action="store_true", help="do not delete the folder")
    parser.add_argument("--out", type=Path, help="also write everything as JSON")
    options = parser.parse_args(arguments)
    if SHAPES[options.shape].large and not torch.cuda.is_available():
        small = ", ".join(name for name, shape in SHAPES.items() if not shape.large)
        parser.error(f"--shape {options.shape} needs a GPU, and torch sees none: choose one of {small}")
    folder = options.folder or RUNS
    if options.folder and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        parser.error(f"--folder {folder} is not an empty folder: it would be removed; give a new one")
    try:
        check_disk(folder, SHAPES[options.shape], dtype)
    except ConfigError as error:
        parser.error(str(error))
    return options


if __name__ == "__main__":
    main()
