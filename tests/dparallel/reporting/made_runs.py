"""Folders of runs as stages leave them, of small stages that cost nothing."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from dparallel.config.experiment import MEASUREMENTS
from dparallel.reporting.cleaning import removals, remove, remove_empty
from dparallel.reporting.past import past_experiments
from dparallel.stages.files import write_atomically
from dparallel.stages.manifest import CLAIM, MANIFEST, FileRecord, Manifest, digest, file_digest, fingerprint

BEGAN = datetime(2026, 11, 1, tzinfo=UTC)


def made(
    experiment: Path,
    label: str,
    number: int,
    inputs: dict[str, Path] | None = None,
    hour: int | None = 0,
    measurements: tuple[str, ...] = (),
    config: dict[str, Any] | None = None,
) -> Path:
    """A stage as it is after a run; finished at `hour`, or unfinished."""
    folder = experiment / f"{label}-{digest([label, number])[:10]}"
    made_of = {name: fingerprint(path) for name, path in (inputs or {}).items()}
    claim = {"stage": label.partition("-")[0], "config": config or {"number": number}, "inputs": made_of}
    write_atomically(folder / "result", f"{label} {number}")
    write_atomically(folder / CLAIM, json.dumps(claim))
    if hour is None:
        return folder
    for name in measurements:
        write_atomically(experiment.parent / MEASUREMENTS / name, name)
    manifest = Manifest(
        **claim,
        files={
            "result": FileRecord(
                bytes=(folder / "result").stat().st_size, sha256=file_digest(folder / "result")
            )
        },
        details={"measurements": dict.fromkeys(measurements, "")},
        seconds=1.0,
        finished_at=(BEGAN + timedelta(hours=hour)).isoformat(),
    )
    write_atomically(folder / MANIFEST, manifest.model_dump_json())
    return folder


def run_of(experiment: Path, number: int, hour: int, trajectories: Path | None = None) -> list[Path]:
    """The stages of a whole run, in their order."""
    recorded = trajectories or made(experiment, "trajectories", number, hour=hour)
    trained = made(experiment, "training-fast", number, {"trajectories": recorded}, hour + 1)
    merged = made(experiment, "merging-fast", number, {"training": trained}, hour + 2)
    names = ("samples/shared/0.parquet", f"samples/{number}/0.parquet")
    measured = made(experiment, "benchmark-sums", number, {"student/fast": merged}, hour + 3, names)
    return [recorded, trained, merged, measured]


def clean(runs: Path, given_up: set[Path] | None = None, **options: bool) -> list[str]:
    """Clean a folder; returns its notes."""
    experiments = past_experiments(runs)
    found, notes = removals(runs, experiments, dict.fromkeys(given_up or (), "named"), **options)
    for removal in found:
        remove(removal)
    remove_empty(experiments)
    return notes


def stages_in(runs: Path) -> set[Path]:
    return {stage.folder for experiment in past_experiments(runs) for stage in experiment.stages}
