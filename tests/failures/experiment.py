"""The experiment of all cases: a random teacher, one student, stages of some seconds each."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from dparallel.config.experiment import MEASUREMENTS
from dparallel.stages.lease import LEASE
from dparallel.stages.manifest import MANIFEST, read_manifest
from tests.flows.conftest import small_settings

STAGES = ("trajectories", "training", "merging", "benchmark")
TIMED = ("tps", "latency", "measured_on", "reused", "hardware", "batch_sizes")
MIDDLE = {  # files of a stage, and how many there are when some of it is done
    "trajectories": ("*/trajectories-*/part-*.parquet", 3),
    "training": ("*/training-*/checkpoints/step-*", 2),
    "merging": ("*/merging-*/.saving-*", 1),
    "benchmark": ("measurements/samples/*/*.parquet", 3),
}
LOST = {  # what has to be computed again after a stage was ended
    "trajectories": "the shards in progress",
    "training": "the steps since the last checkpoint",
    "merging": "the merging in progress",
    "benchmark": "the slices in progress",
}
TEMPORARY = ("*.partial", ".saving-*", LEASE, "unfinished")


def settings(teacher: Path, runs: Path) -> dict[str, Any]:
    """Ten shards, eight checkpoints, and a dozen slices of samples."""
    experiment = small_settings(teacher, runs)
    experiment["students"] = {"published": experiment["students"]["published"]}
    experiment["trajectories"]["problems"]["count"] = 80
    experiment["trajectories"] |= {"shard_size": 8, "batch_size": 8}
    experiment["trajectories"]["decoding"]["steps"] = 36
    experiment["training"] |= {"train_steps": 40, "checkpoint_every": 5}
    experiment["merging"] = {"check_prompts": 80}
    coins = experiment["benchmarks"]["coins"]
    coins["batch_size"] = 16
    for split in ("test", "validation"):
        coins[split]["count"] = 128
    return experiment


def stage_folder(runs: Path, stage: str) -> Path:
    """The folder of a stage, which has one student and one benchmark."""
    [folder] = (folder for folder in runs.glob(f"*/{stage}-*") if folder.is_dir())
    return folder


def done_of(runs: Path, stage: str) -> int:
    """How much of a stage is done, in the units of `MIDDLE`."""
    return len(list(runs.glob(MIDDLE[stage][0])))


def is_in_the_middle(runs: Path, stage: str) -> bool:
    """Whether some of a stage is done."""
    return done_of(runs, stage) >= MIDDLE[stage][1]


def results(runs: Path) -> dict[str, str]:
    """Of every finished stage, by the name of its folder, a digest of all that does not depend on time."""
    found = {}
    for manifest in sorted(runs.glob(f"*/*/{MANIFEST}")):
        folder = manifest.parent
        found[folder.name] = read_manifest(folder).fingerprint
        if folder.name.startswith("benchmark-"):
            rows = json.loads((folder / "results.json").read_bytes())["rows"]
            untimed = [{key: value for key, value in row.items() if key not in TIMED} for row in rows]
            found[folder.name] = hashlib.sha256(json.dumps(untimed, sort_keys=True).encode()).hexdigest()
    return found


def copy_before(reference: Path, runs: Path, stage: str) -> None:
    """The folder of runs as it is when a stage begins: only what was finished before is there."""
    later = STAGES[STAGES.index(stage) :]
    ignored = [f"{name}-*" for name in (*later, "report")]
    shutil.copytree(reference, runs, ignore=shutil.ignore_patterns(*ignored, MEASUREMENTS, "tracking"))


def temporary_files(folder: Path) -> list[Path]:
    """What a run leaves only if it is killed."""
    return sorted(path for pattern in TEMPORARY for path in folder.rglob(pattern))
