import gc
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
from tasks.tracking.registry import ALIAS
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


def artifacts(client: MlflowClient, run: mlflow.entities.Run, folder: str | None = None) -> set[str]:
    return {each.path for each in client.list_artifacts(run.info.run_id, folder)}


def files_below(folder: Path) -> dict[Path, int]:
    return {path: os.stat(path).st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def live_models() -> set[int]:
    """The models of this process that hold weights, by identity."""
    gc.collect()
    models = [found for found in gc.get_objects() if type(found) is DiffusionTransformer]
    return {id(model) for model in models if model.device.type != "meta"}


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
    assert text.endswith(f"mlflow ui --backend-store-uri {local_store}")

    # 2. What MLflow shows
    parent, children = family(client)
    assert sorted(children) == STAGES
    assert {run.info.status for run in (parent, *children.values())} == {"FINISHED"}
    assert parent.data.params["students.published.certainty_weight"] == "2.0"
    assert {"table.md", "tradeoff.png", "certainty.png", "config.yaml", *made} <= artifacts(client, parent)
    measured = find_run(parent.info.run_id, tmp_path / "runs")
    assert [(name, folder.name.split("-")[0]) for name, folder in measured.stages] == [("coins", "benchmark")]
    assert {"headline/nfe_ratio", "teacher/one_token_per_step/tpf"} <= set(parent.data.metrics)
    trained = children["training published"]
    assert [each.step for each in client.get_metric_history(trained.info.run_id, "loss")] == [1, 2, 3]
    assert "adapter/adapter_model.safetensors" in artifacts(client, trained, "adapter")
    (recorded,) = children["trajectories"].inputs.dataset_inputs
    assert recorded.dataset.name == "coins-train"
    assert children["trajectories"].data.metrics["count/rows"] == 24
    (version,) = client.search_model_versions("name = 'small-published'")
    assert ALIAS not in client.get_registered_model("small-published").aliases, "the teacher solves nothing"
    assert version.run_id == children["merging published"].info.run_id
    assert "model/model.safetensors" in artifacts(client, children["merging published"], "model")
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
    assert sorted(repeated) == STAGES
    assert {run.data.tags["reused"] for run in repeated.values()} == {"true"}
    assert artifacts(client, repeated["merging published"]) == {"config.yaml", "manifest.json"}
    assert len(client.search_model_versions("name = 'small-published'")) == 1

    # 4. A student with another recipe: only what depends on it is computed. Every stage runs on its pool
    deployed, sent = deployments(), []

    def worker(deployment: str, runs: dict[str, dict[str, Any]]) -> None:
        flow, _ = deployed[deployment]
        for name, parameters in runs.items():
            flow.validate_parameters(parameters)
            sent.append(name)
            flow(**parameters)

    monkeypatch.setattr("flows.distill.dispatch", worker)
    on_pools = get_args(StageName)
    distill(str(config_file), ["students.published.certainty_weight=1.0"], on_pools)
    overridden = " (students.published.certainty_weight=1.0)"
    assert sorted(sent) == [f"small: {name}{overridden}" for name in STAGES]
    _, changed = family(client)
    anew = {name for name, run in changed.items() if run.data.tags["reused"] == "false"}
    assert anew == {"training published", "merging published", "benchmark coins"}


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
