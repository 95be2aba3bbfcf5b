"""Merged models in MLflow: each is a logged model of its run, whose files MLflow itself can load."""

import json
import tempfile
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus

from dparallel.config.decoding import DecodingConfig
from dparallel.models.defaults import write_defaults
from dparallel.stages.files import is_there
from dparallel.stages.generation_file import GENERATION
from dparallel.stages.manifest import MANIFEST, Manifest, read_manifest
from tasks.tracking.records import Record

CODE = Path(__file__).with_name("pyfunc_model.py")
CHECKPOINT, DECODING = "checkpoint", "decoding.json"  # as in pyfunc_model.py
REQUIREMENTS = ("dparallel", "torch", "transformers")
EXAMPLE = "What is 6 times 7?"
OUTPUTS = {"response": "string", "nfe": "long", "tokens": "long", "finish_reason": "string"}
PARAMETERS = {
    "gen_length": "long",
    "block_length": "long",
    "rule": "string",
    "threshold": "double",
    "steps": "long",
    "mode": "string",
    "temperature": "double",
    "seed": "long",
    "batch_size": "long",
    "chat": "boolean",
}


def log_model(
    client: MlflowClient, experiment_id: str, run_id: str, record: Record, manifest: Manifest
) -> LoggedModel:
    """Log the merged model of a finished merging as a model of its run, once."""
    found = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")
    if found and found[0].status == LoggedModelStatus.READY:
        return found[0]
    name = record.student or "student"
    model = found[0] if found else client.create_logged_model(experiment_id, name, run_id, record.tags)
    folder = Path(record.folder or "")
    for file in manifest.files:  # straight from the stage's folder, without another copy
        parent = Path(file).parent
        client.log_model_artifact(
            model.model_id, str(folder / file), None if parent == Path() else parent.as_posix()
        )
    decoding, prompt = _of_training_data(record.inputs)
    with tempfile.TemporaryDirectory() as scratch:
        described = Path(scratch) / "model"
        _describe(described, model.model_id, prompt)
        (described / DECODING).write_text(json.dumps(decoding, indent=1), encoding="utf-8")
        client.log_model_artifacts(model.model_id, str(described))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
    return model


def set_decoding(
    client: MlflowClient, model_id: str, decoding: DecodingConfig, chosen: Mapping[str, Any]
) -> None:
    """Make a decoding the default of a logged model: the one with which it was measured.

    It is the one of MLflow's own loader, and among the model's files the decode defaults of the checkpoint.

    Args:
        chosen: where it was chosen, for the decode defaults.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if any(file.path == GENERATION for file in client.list_logged_model_artifacts(model_id)):
            place = client.get_logged_model(model_id).artifact_location
            uri = f"{place}/{GENERATION}"  # in `models:/ID/…`, a path below the model is read as a version
            download_artifacts(artifact_uri=uri, dst_path=scratch, tracking_uri=client.tracking_uri)
        write_defaults(Path(scratch), decoding.portable(), chosen)
        client.log_model_artifact(model_id, str(Path(scratch) / GENERATION))
        file = Path(scratch) / DECODING
        settings = decoding.model_dump(mode="json", exclude_none=True)
        file.write_text(json.dumps(settings, indent=1), encoding="utf-8")
        client.log_model_artifact(model_id, str(file))


def _describe(folder: Path, model_id: str, prompt: str) -> None:
    """Write the files by which MLflow loads a model whose own files lie in the same folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # recommends type hints instead of a signature
        import mlflow.pyfunc  # takes seconds
        from mlflow.models import Model, ModelSignature
        from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

        mlflow.pyfunc.save_model(
            folder,
            python_model=str(CODE),
            signature=ModelSignature(
                inputs=Schema([ColSpec("string", "prompt")]),
                outputs=Schema([ColSpec(kind, name) for name, kind in OUTPUTS.items()]),
                params=ParamSchema([ParamSpec(name, kind, None) for name, kind in PARAMETERS.items()]),
            ),
            input_example=pd.DataFrame({"prompt": [prompt]}),
            pip_requirements=[f"{name}=={found}" for name in REQUIREMENTS if (found := _version(name))],
            mlflow_model=Model(model_id=model_id),
        )
    file = str(folder / "MLmodel")
    model = Model.load(file)
    model.flavors["python_function"] |= {
        "artifacts": {CHECKPOINT: {"path": ".", "uri": "."}},
        "model_code_path": CODE.name,  # without the folder of this machine
    }
    model.save(file)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # such as a source folder on the path
        return None


def _of_training_data(inputs: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """A decoding for the responses that the student learnt from, and one of their prompts."""
    folders = {name: Path(inputs[name]) for name in ("trajectories", "training") if name in inputs}
    there = {name: folder for name, folder in folders.items() if is_there(folder / MANIFEST)}
    if set(there) != {"trajectories", "training"}:
        return {}, EXAMPLE
    recorded = read_manifest(there["trajectories"], "trajectories")
    recipe = read_manifest(there["training"], "training").config["recipe"]
    shape = {name: recorded.config["decoding"][name] for name in ("gen_length", "block_length")}
    if recipe.get("attention") == "block_causal":
        shape |= {"block_length": recipe["block_length"], "mode": "pipelined"}
    shard = there["trajectories"] / min(recorded.files)
    prompts = pq.read_table(shard, columns=["prompt"])["prompt"].to_pylist()
    return DecodingConfig(**shape).model_dump(mode="json", exclude_none=True), (prompts or [EXAMPLE])[0]
