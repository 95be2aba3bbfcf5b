import gc
import json
import os
from pathlib import Path
from typing import Any, get_args

import mlflow.entities
import pytest
from mlflow import MlflowClient

from dparallel.config.problems import ProblemsConfig
from dparallel.models.backbone import DiffusionTransformer
from dparallel.problems.registry import load_problems
from dparallel.problems.sources import Problem
from dparallel.reporting.find import find_run
from dparallel.stages.manifest import MANIFEST, read_manifest
from flows.distill import StageName, distill
from tasks.launch import TrainingRefused, launch
from tests.test_architecture import deployments

pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.timeout(600)]

STAGES = [
    "benchmark coins",
    "merging no_certainty",
    "merging published",
    "training no_certainty",
    "training published",
    "trajectories",
]


def family(client: MlflowClient, newest_first: int = 0) -> tuple[mlflow.entities.Run, dict]:
    """A distill run and its children by name."""
    experiment = client.get_experiment_by_name("small")
    assert experiment is not None
    every = client.search_runs([experiment.experiment_id], order_by=["start_time DESC"])
    parents = [run for run in every if run.data.tags["stage"] == "distill"]
    parent = parents[newest_first]
    children = [run for run in every if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    return parent, {run.info.run_name: run for run in children}


def datasets_of(run: mlflow.entities.Run) -> set[tuple[str, str]]:
    """Name and use of the data sets of a run."""
    return {(each.dataset.name, each.tags[0].value) for each in run.inputs.dataset_inputs}


def artifacts(client: MlflowClient, run: mlflow.entities.Run, folder: str | None = None) -> set[str]:
    return {each.path for each in client.list_artifacts(run.info.run_id, folder)}


def files_below(folder: Path) -> dict[Path, int]:
    return {path: os.stat(path).st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def live_models() -> set[int]:
    """The models of this process that hold weights, by identity."""
    gc.collect()
    models = [found for found in gc.get_objects() if type(found) is DiffusionTransformer]
    return {id(model) for model in models if model.device.type != "meta"}


@pytest.mark.slow
def test_the_whole_pipeline_and_again(
    config_file: Path, local_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = live_models()
    loaded: list[str] = []
    held: list[int] = []

    def counted(config: ProblemsConfig) -> list[Problem]:
        loaded.append(config.split)
        return load_problems(config)

    def launched(*arguments: Any, **options: Any) -> None:
        held.extend(live_models() - before)
        launch(*arguments, **options)

    monkeypatch.setattr("dparallel.preflight.checks.load_problems", counted)
    monkeypatch.setattr("tasks.training.launch", launched)
    text = distill(str(config_file))
    assert loaded == ["train", "test", "validation"], "the checks run once, for all stages together"
    assert held == [], "training is launched beside no model that this process still holds"
    client = MlflowClient(tracking_uri=local_store)

    # 1. The report: the table, existing plots, the page, how to open MLflow
    assert text.startswith("| model")
    pictures = [line.strip() for line in text.splitlines() if line.endswith(".png")]
    assert {Path(each).name for each in pictures} == {"certainty.png", "tradeoff.png", "loss_curves.png"}
    assert all(Path(each).is_file() for each in pictures)
    [page] = [Path(line.strip()) for line in text.splitlines() if line.endswith(".html")]
    assert "published, entropy" in page.read_text(encoding="utf-8")
    made = {file.name for file in page.parent.iterdir()}
    assert made == {"report.html", "report.md", "report.json", "tradeoff-coins.png", "loss_curves.png"}
    command, address = (line.strip() for line in text.splitlines()[-2:])
    assert command.endswith(f"-m tasks.tracking ui --store {local_store}")
    assert "/runs?workflowType=machine_learning" in address

    # 2. What MLflow shows
    parent, children = family(client)
    assert sorted(children) == STAGES
    assert {run.info.status for run in (parent, *children.values())} == {"FINISHED"}
    assert parent.info.run_name == "small: no_certainty, published"
    assert parent.data.params["students.published.certainty_weight"] == "2.0"
    assert len(parent.data.params) < 40
    below = [run.data.params for run in children.values()]
    assert all(parent.data.params[key] == value for params in below for key, value in params.items())
    assert parent.data.tags["default_student"] == "none"
    assert "| teacher" in parent.data.tags["mlflow.note.content"]
    assert "| training published |" in parent.data.tags["mlflow.note.content"]
    datasets = {run: datasets_of(children[run]) for run in children}
    assert datasets["trajectories"] == {("coins-train", "trajectories")}
    assert datasets["training published"] == {("trajectories of small", "training")}
    assert datasets["benchmark coins"] == {("coins-test", "test"), ("coins-validation", "validation")}
    assert datasets_of(parent) == set().union(*datasets.values())
    assert {"commit", "family", "device", "protocol", "prefect_run", "mlflow.source.name"} <= set(
        parent.data.tags
    )
    assert {"table.md", "tradeoff.png", "certainty.png", "config.yaml", *made} <= artifacts(client, parent)
    measured = find_run(parent.info.run_id, tmp_path / "runs")
    assert [(name, folder.name.split("-")[0]) for name, folder in measured.stages] == [("coins", "benchmark")]
    assert {
        "headline/accuracy",
        "headline/teacher_nfe",
        "teacher/one_token_per_step/tpf",
        "seconds/training published",
        "tokens/benchmark coins",
    } <= set(parent.data.metrics)
    assert '"type": "table"' in parent.data.tags["mlflow.loggedArtifacts"]
    file = Path(client.download_artifacts(parent.info.run_id, "samples/coins.json", str(tmp_path)))
    table = json.loads(file.read_text(encoding="utf-8"))
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert len(rows) == 24 * len({(row["model"], row["method"]) for row in rows})
    assert all(row["prompt"] and row["correct"] is False for row in rows)
    assert children["benchmark coins"].data.metrics["tokens"] > 0
    assert children["training published"].data.metrics["seconds"] > 0
    trained = children["training published"]
    assert [each.step for each in client.get_metric_history(trained.info.run_id, "loss")] == [1, 2, 3]
    assert "adapter/adapter_model.safetensors" in artifacts(client, trained, "adapter")
    assert children["trajectories"].data.metrics["count/rows"] == 24
    versions = client.search_model_versions("name = 'small'")
    assert {version.tags["student"] for version in versions} == {"published", "no_certainty"}
    assert not client.get_registered_model("small").aliases, "the teacher solves nothing"
    assert "no student is the default on coins" in parent.data.tags["champion"]
    assert "tradeoff.png" in artifacts(client, children["benchmark coins"])

    # 3. A second run: nothing is computed again, and MLflow says so
    runs = tmp_path / "runs" / "small"
    written_again = (page.parent, runs / "tracking")  # which belong to no stage
    stages = {
        path: changed for path, changed in files_below(runs).items() if path.parent not in written_again
    }
    assert len([path for path in stages if path.name == MANIFEST]) == len(STAGES)
    assert distill(str(config_file)) == text
    again = files_below(runs)
    assert {path: again[path] for path in stages} == stages
    second, repeated = family(client)
    assert second.info.run_id != parent.info.run_id
    assert repeated == {}, "a stage is in a store once"
    assert second.info.run_name == "small: no_certainty, published (reused)"
    made_before = {
        key.removeprefix("reused/"): run_id
        for key, run_id in second.data.tags.items()
        if key.startswith("reused/")
    }
    assert made_before == {name: run.info.run_id for name, run in children.items()}
    assert second.data.metrics["headline/accuracy"] == parent.data.metrics["headline/accuracy"]
    assert second.data.metrics["seconds"] == 0
    assert len(client.search_model_versions("name = 'small'")) == 2

    # 4. A student with another recipe: only what depends on it is computed. Every stage runs on its pool
    deployed, sent = deployments(), []

    def worker(deployment: str, runs: dict[str, dict[str, Any]], *limits: Any) -> None:
        flow, _ = deployed[deployment]
        for name, parameters in runs.items():
            flow.validate_parameters(parameters)
            sent.append(name)
            flow(**parameters)

    monkeypatch.setattr("flows.distill.dispatch", worker)
    on_pools = get_args(StageName)
    distill(str(config_file), ["students.published.certainty_weight=1.0"], on_pools)
    overridden = " (certainty_weight=1.0)"
    assert sorted(sent) == [f"small: {name}{overridden}" for name in STAGES]
    third, changed = family(client)
    assert third.info.run_name == "small: no_certainty, published (certainty_weight=1.0)"
    assert set(changed) == {"training published", "merging published", "benchmark coins"}


@pytest.mark.slow
def test_training_that_fails_fails_the_flow(config_file: Path, local_store: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingRefused, match="none is left to train on") as error:
        distill(str(config_file), ["training.only_correct=true"])
    assert "\n" not in str(error.value)
    parent, children = family(MlflowClient(tracking_uri=local_store))
    statuses = {name: run.info.status for name, run in children.items()}
    assert statuses == {"trajectories": "FINISHED", "training no_certainty": "FAILED"}
    assert parent.info.status == "FAILED"
    (folder,) = (tmp_path / "runs" / "small").glob("trajectories-*/")
    assert read_manifest(folder).counts["rows"] == 24, "what was done stays done"
