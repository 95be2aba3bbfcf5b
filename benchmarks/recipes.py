"""Compare the recipes of an experiment over several seeds: one command, tables and a plot.

    python -m benchmarks.recipes --config configs/tiny_recipes.yaml --seeds 0 1 2

Runs the flow `distill` for each training seed, with the same teacher, trajectories, problems and number of
train steps; finished stages are reused. Then it pools the seeds and times all models side by side: every
round decodes with each model once at every batch size. `--parts consistency:certainty_forcing` says what a
part of a recipe is worth. It writes `comparison.md`, `comparison.png` and
`comparison.json` to the experiment's folder and logs them as an MLflow run next to the runs of the seeds.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.hardware import describe
from benchmarks.common.options import Distinct, positive
from benchmarks.common.side_by_side import contenders, measure_speeds
from benchmarks.recipes_parts import MEANING as PARTS
from benchmarks.recipes_parts import as_pairs, parts_table
from benchmarks.recipes_report import TWO_POINTS, figure, headlines, numbers, speed_table, table, with_aup_2
from dparallel.config.base import UserError
from dparallel.reporting.aup import MEANING
from dparallel.reporting.read import read_benchmark
from dparallel.stages.experiment import StagePlan
from dparallel.stages.streams import set_encodings
from tasks.checks import checked_experiment, chosen
from tasks.tracking.run import track


def overrides(seed: int, more: Sequence[str]) -> list[str]:
    """Settings of a run with this training seed."""
    return [f"training.seed={seed}", *more]


def listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def run(config: str, benchmark: str, seed: int, more: Sequence[str]) -> StagePlan:
    """Run the experiment with a training seed; returns the finished stage of a benchmark."""
    settings = overrides(seed, more)
    command = [sys.executable, "-m", "flows.distill", "--config", config, "--set", *settings]
    subprocess.run(command, check=True)
    return checked_experiment(config, settings, stages=[]).benchmark(benchmark)


def main() -> int:
    set_encodings()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--benchmark", help="name of a benchmark in the config (default: its first one)")
    parser.add_argument("--seeds", type=int, nargs="+", action=Distinct, default=[0, 1, 2])
    parser.add_argument(
        "--batch-sizes",
        type=positive,
        nargs="+",
        action=Distinct,
        default=[1, 16],
        help="for side-by-side timing",
    )
    parser.add_argument("--problems", type=positive, default=64, help="limit of problems decoded in a round")
    parser.add_argument("--rounds", type=positive, default=5, help="of the timing")
    parser.add_argument("--compile", action="store_true", help="time all models also with compiled steps")
    parser.add_argument(
        "--parts",
        nargs="+",
        default=[],
        metavar="WITHOUT:WITH",
        help="pairs whose AUP is compared: students, each with its best method, or STUDENT/METHOD",
    )
    parser.add_argument("--set", dest="more", nargs="+", default=[], metavar="key.sub=value")
    options = parser.parse_args()
    try:
        compare(options)
    except UserError as error:
        print(f"python -m benchmarks.recipes: error: {error}", file=sys.stderr)
        return 2
    return 0


def compare(options: argparse.Namespace) -> None:
    """Run the seeds, pool their results, time the models, and write the comparison.

    Raises:
        UserError: an option or the config cannot be used; raised before anything runs.
    """
    experiment = checked_experiment(options.config, options.more)
    benchmarks = experiment.config.benchmarks
    [benchmark] = chosen("benchmark", benchmarks, options.benchmark or next(iter(benchmarks)))
    pairs = as_pairs(options.parts, benchmarks[benchmark], list(experiment.config.students))
    with track(experiment.folder, "comparison", "comparison", vars(options)) as record:
        plans = [run(options.config, benchmark, seed, options.more) for seed in options.seeds]
        folders = [Path(plan.out_dir) for plan in plans]
        results = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in folders]
        found = [
            read_benchmark(benchmark, folder, run=str(seed))
            for seed, folder in zip(options.seeds, folders, strict=True)
        ]
        metrics = with_aup_2([each.manifest.metrics for each in found], found)
        speeds = measure_speeds(
            contenders(results[0]["rows"]),
            plans[0].inputs,
            benchmarks[benchmark].test,
            options.batch_sizes,
            options.problems,
            options.rounds,
            options.compile,
        )
        machine = describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        first = results[0]
        text = "\n\n".join(
            [
                table(metrics),
                headlines(options.seeds, results),
                *([parts_table(metrics, pairs), PARTS] if pairs else []),
                f"{first['reference']['samples']} test problems, batch {listed(first['batch_sizes'])}, "
                f"{listed(first['hardware'])}; AUP on the {first['aup'][0]['split']} problems. {MEANING} "
                f"{TWO_POINTS}",
                f"Side by side, seed {options.seeds[0]}, the first {options.problems} test problems (NFE of "
                f"these, solutions of all), medians of {options.rounds} rounds:",
                speed_table(speeds),
                " · ".join(f"{name}: {value}" for name, value in machine.items()),
            ]
        )
        out = experiment.folder
        (out / "comparison.md").write_text(text + "\n", encoding="utf-8")
        figure(results).savefig(out / "comparison.png", dpi=200)
        record_of_all = {
            "machine": machine,
            "seeds": dict(zip(options.seeds, map(str, folders), strict=True)),
            "pooled": numbers(metrics),
            "speeds": [vars(speed) for speed in speeds],
        }
        (out / "comparison.json").write_text(json.dumps(record_of_all, indent=1) + "\n", encoding="utf-8")
        made = [str(out / f"comparison.{ending}") for ending in ("md", "png", "json")]
        record.update(files=made, metrics=numbers(metrics))
    print(f"\n{text}\n\n" + "\n".join(made))


if __name__ == "__main__":
    sys.exit(main())
