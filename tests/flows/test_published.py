"""A whole experiment on what others published: their responses in place of a recording, and their adapter."""

import json
import random
from pathlib import Path

import peft
import pytest
import torch
import yaml
from mlflow import MlflowClient

from dparallel.decoding.generate import generate
from dparallel.models.checkpoints import load_model
from dparallel.problems.embedded import embedded_task
from flows.distill import distill
from tests.flows.conftest import small_settings

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server"), pytest.mark.timeout(600)]


def published_responses(path: Path, count: int) -> Path:
    """Rows as dParallel publishes them: questions, and finished responses as text."""
    task, rng = embedded_task("coins"), random.Random(0)
    rows = [
        {"question": problem.prompt, "llm_response": task.draw_solution(problem, rng), "gt": problem.answer}
        for _, problem in zip(range(count), task.problems("train", seed=0), strict=False)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def published_adapter(teacher: Path, folder: Path) -> Path:
    """An adapter in PEFT's layout that changes what the teacher computes."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(load_model(teacher, device="cpu"), config).save_pretrained(folder)
    return folder


def test_published_responses_and_a_published_adapter(
    tiny_checkpoint: Path, tmp_path: Path, local_store: str
) -> None:
    settings = small_settings(tiny_checkpoint, tmp_path / "runs")
    settings["trajectories"]["problems"] = {
        "benchmark": "dataset",
        "sources": [{"path": str(published_responses(tmp_path / "responses.jsonl", 24))}],
        "protocol": {"prompt": "{question}"},
    }
    settings["trajectories"]["imported"] = {"response": "llm_response"}
    adapter = published_adapter(tiny_checkpoint, tmp_path / "adapter")
    settings["students"] = {
        "trained": settings["students"]["published"],
        "given": {"adapter": str(adapter)},
    }
    config = tmp_path / "published.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    table = distill(str(config))
    assert "| given   | entropy " in table
    assert "| trained | entropy " in table

    client = MlflowClient(tracking_uri=local_store)
    [experiment] = [each for each in client.search_experiments() if each.name == "small"]
    names = {run.info.run_name for run in client.search_runs([experiment.experiment_id])}
    assert {"trajectories", "training trained", "merging trained", "merging given", "benchmark coins"} < names
    assert "training given" not in names

    # The merged student computes what PEFT computes with the adapter.
    [merged] = (tmp_path / "runs" / "small").glob("merging-given-*")
    beside = peft.PeftModel.from_pretrained(load_model(tiny_checkpoint, device="cpu"), adapter).eval()
    ids = torch.randint(3, 40, (1, 20), generator=torch.Generator().manual_seed(0))
    student = load_model(merged, device="cpu")
    with torch.inference_mode():
        assert torch.allclose(student(ids), beside(ids), atol=1e-4)
    assert generate(student, [[5, 6]]), "with the decode defaults that the benchmark chose"
    assert student.defaults is not None
