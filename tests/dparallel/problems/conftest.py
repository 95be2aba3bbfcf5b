"""Fixtures for tests of tasks of lm-eval."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dparallel.config.problems import ProblemsConfig
from dparallel.problems import lm_eval_data, lm_eval_metrics, lm_eval_probing
from dparallel.problems.lm_eval_index import names, task_settings
from tests.dparallel.problems.lm_eval_made import ROWS, YAML, config


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    found = {}
    for split, rows in {"test": ROWS[:5], "train": ROWS[5:]}.items():
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        found[split] = str(path)
    return found


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ProblemsConfig]]:
    """Writes a task of one's own, with its rows; gives the settings of its problems."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("dparallel.problems.lm_eval_index._folder", lambda: tmp_path / "tasks")
    caches = (
        names,
        task_settings,
        lm_eval_data.open_task,
        lm_eval_probing.usable_scorer,
        lm_eval_metrics._aggregation,
    )

    def write(yaml: str, answers: Sequence[str], code: str = "", **settings: Any) -> ProblemsConfig:
        for cached in caches:
            cached.cache_clear()
        (tmp_path / "tasks").mkdir(exist_ok=True)
        (tmp_path / "tasks" / "own.yaml").write_text(YAML.lstrip() + yaml, encoding="utf-8")
        (tmp_path / "tasks" / "own_code.py").write_text(code, encoding="utf-8")
        rows = [{"question": f"Question {n}?", "answer": answer} for n, answer in enumerate(answers)]
        file = tmp_path / "own.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return config("own", num_fewshot=0, data_files={"test": str(file)}, **settings)

    yield write
    for cached in caches:
        cached.cache_clear()
