"""Compare the recipes of an experiment over several seeds: one command, one table.

    python -m benchmarks.recipes --config configs/tiny.yaml --seeds 0 1 2

Runs the flow `distill` once per training seed (same teacher, trajectories and problems; stages already
done are not redone) and prints, for each model and method, mean and spread (standard deviation over
seeds) at its operating point on the test problems. AUP is over the sweep, which the validation problems
serve unless `--set benchmark.sweep_test=true`. The teacher's rows vary with nothing but the clock.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dparallel.config import DistillConfig
from dparallel.config_files import load_config
from dparallel.experiment import Experiment
from dparallel.manifest import read_manifest

COLUMNS = {
    "accuracy": ("solution %", 100, 1),
    "answer_accuracy": ("answer %", 100, 1),
    "nfe": ("NFE", 1, 2),
    "tpf": ("TPF", 1, 2),
    "aup": ("AUP", 1, 0),
    "tps": ("TPS", 1, 0),
}


def overrides(seed: int, more: Sequence[str]) -> list[str]:
    return [f"training.seed={seed}", *more]


def run(config: str, seed: int, more: Sequence[str]) -> Path:
    """Run the whole experiment with one training seed; the folder of its benchmark."""
    settings = overrides(seed, more)
    command = [sys.executable, "-m", "flows.distill", "--config", config, "--set", *settings]
    subprocess.run(command, check=True)
    return Path(Experiment(load_config(DistillConfig, config, settings)).benchmark().out_dir)


def table(runs: Sequence[dict[str, float]]) -> str:
    """Markdown from the flat benchmark metrics of several seeds."""
    rows = [["model", "method", "threshold", *(title for title, _, _ in COLUMNS.values())]]
    for name in dict.fromkeys(key.rpartition("/")[0] for run in runs for key in run):
        if f"{name}/accuracy" not in runs[0]:
            continue
        model, _, method = name.rpartition("/")
        thresholds = [run.get(f"{name}/threshold") for run in runs]
        cells = [", ".join(f"{each:g}" for each in thresholds if each is not None)]
        for column, (_, scale, digits) in COLUMNS.items():
            values = [run[f"{name}/{column}"] * scale for run in runs if f"{name}/{column}" in run]
            cells.append(mean_and_spread(values, digits))
        rows.append([model.rpartition("/")[2], method, *cells])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---|---|" + "---:|" * (len(rows[0]) - 2), *lines[1:]])


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def headlines(seeds: Sequence[int], folders: Sequence[Path]) -> str:
    """The default student of each seed against the undistilled teacher."""
    lines = [
        "| seed | default student | points lost | NFE, times fewer | TPF, times the teacher's best |",
        "|---|---|---:|---:|---:|",
    ]
    for seed, folder in zip(seeds, folders, strict=True):
        results = json.loads((folder / "results.json").read_text())
        head = results["headline"]
        lines.append(
            f"| {seed} | {results['default_student'].rpartition('/')[2]} "
            f"| {head['accuracy_loss'] * 100:+.1f} | "
            f"{head['nfe_ratio']:.2f} | {head['tpf_ratio_to_teacher_best']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", dest="more", nargs="+", default=[], metavar="key.sub=value")
    arguments = parser.parse_args()
    folders = [run(arguments.config, seed, arguments.more) for seed in arguments.seeds]
    manifests = [read_manifest(folder, "benchmark") for folder in folders]
    results = json.loads((folders[0] / "results.json").read_text())
    print(
        f"\n{table([manifest.metrics for manifest in manifests])}\n\n{headlines(arguments.seeds, folders)}\n"
    )
    print(
        f"{results['reference']['samples']} test problems, batch {results['batch_size']}, "
        f"{results['hardware']}"
    )
    print("\n".join(f"seed {seed}: {folder}" for seed, folder in zip(arguments.seeds, folders, strict=True)))


if __name__ == "__main__":
    main()
