from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.testing.utilities import prefect_test_harness

from tests.stores import new_store

DECODING = {"gen_length": 36, "block_length": 12}


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A Prefect server for the tests of a session."""
    with prefect_test_harness(server_startup_timeout=180):
        yield


def small_settings(teacher: Path, runs: Path) -> dict[str, Any]:
    """An experiment that takes seconds: a random teacher, 24 problems, 3 train steps, 2 students."""
    coins = {"benchmark": "coins", "count": 24}
    block = {"region": "block", "block_length": 12, "masking": "random"}
    return {
        "name": "small",
        "teacher": str(teacher),
        "runs": str(runs),
        "trajectories": {
            "problems": {**coins, "split": "train"},
            "decoding": {**DECODING, "rule": "steps", "steps": 12},
        },
        "training": {
            "optimizer": {"learning_rate": 1e-3},
            "train_steps": 3,
            "views_per_step": 4,
            "micro_batch_size": 4,
            "only_correct": False,
            "log_every": 1,
        },
        "students": {
            "published": {**block, "complement": True, "certainty_weight": 2.0},
            "no_certainty": {**block, "complement": True},
        },
        "merging": {"check_prompts": 2},
        "benchmarks": {
            "coins": {
                "test": {**coins, "split": "test"},
                "validation": {**coins, "split": "validation"},
                "reference": {**DECODING, "rule": "steps", "steps": 36},
                "sweeps": {
                    "entropy": {"decoding": {**DECODING, "rule": "entropy"}, "thresholds": [0.5, 5.0]}
                },
                "teacher_sweeps": ["entropy"],
                "student_sweeps": ["entropy"],
                "max_loss": 1.0,
            }
        },
    }


@pytest.fixture
def config_file(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(small_settings(tiny_checkpoint, tmp_path / "runs")), encoding="utf-8")
    return path


@pytest.fixture
def local_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tracking store of a test."""
    uri = new_store(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri
