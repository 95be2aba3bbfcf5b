"""The data that a stage works on, as inputs of its run, with digests of their content."""

import json
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag

from dparallel.config.base import joined
from dparallel.config.problems import ProblemsConfig
from dparallel.stages.files import is_there
from dparallel.stages.manifest import MANIFEST, Manifest, digest, read_manifest
from tasks.tracking.describe import dataset_name

DIGEST = 8  # characters of a digest, as MLflow's own data sets have


def of_stage(manifest: Manifest, folder: Path, inputs: dict[str, str]) -> list[DatasetInput]:
    """Data sets of a finished stage: its problems, and the trajectories that it reads.

    Args:
        folder: the stage's folder.
        inputs: folders of its inputs, by name; what is not there is left out.
    """
    found = _problems(manifest)
    trajectories = Path(inputs.get("trajectories", ""))
    if "trajectories" in inputs and is_there(trajectories / MANIFEST):
        found.append(_trajectories(read_manifest(trajectories, "trajectories"), trajectories))
    return found


def of_experiment(stages: list[str]) -> list[DatasetInput]:
    """Data sets of all stages of an experiment, each once."""
    found: dict[tuple[str, str, str], DatasetInput] = {}
    for folder in map(Path, stages):
        if is_there(folder / MANIFEST):
            manifest = read_manifest(folder)
            trajectories = {"trajectories": str(folder)} if manifest.stage == "trajectories" else {}
            for one in of_stage(manifest, folder, trajectories):
                found[one.dataset.name, one.dataset.digest, one.tags[0].value] = one
    return list(found.values())


def _problems(manifest: Manifest) -> list[DatasetInput]:
    """The sets of problems of a stage; a digest covers all of them and how these are asked."""
    sections = {"problems": "trajectories", "validation": "validation", "test": "test"}
    found = []
    for section, context in sections.items():
        settings = manifest.config.get(section)
        if settings is None:
            continue
        whole = joined(settings, manifest.how.get(section, {}))
        name = dataset_name(ProblemsConfig.model_validate(whole))
        source = (manifest.details.get("data") or {}).get(section) or name
        content = digest([manifest.details.get("problems"), settings])
        found.append(_input(name, content, {"data": source}, {"problems": settings.get("count")}, context))
    return found


def _trajectories(manifest: Manifest, folder: Path) -> DatasetInput:
    name = f"trajectories of {folder.parent.name}"
    return _input(name, manifest.fingerprint, {"uri": str(folder)}, manifest.counts, "training")


def _input(name: str, content: str, source: Any, profile: Any, context: str) -> DatasetInput:
    dataset = Dataset(
        name=name[:500],
        digest=content[:DIGEST],
        source_type="local",
        source=json.dumps(source),
        profile=json.dumps(profile),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
