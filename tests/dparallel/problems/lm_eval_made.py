"""Tasks of lm-eval for tests, with rows of our own."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from dparallel.config.problems import ProblemsConfig

HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not HAS_LM_EVAL, reason="lm-eval is missing")
MARKS = [
    pytest.mark.filterwarnings("ignore"),  # of lm-eval and of what it imports
    pytest.mark.slow,  # it takes seconds to import
]
ROWS = [
    {"question": f"Tom has {n} coins and finds {n}. How many?", "answer": f"{n} + {n}\n#### {2 * n},000"}
    for n in range(1, 9)
]


def config(task: str | None = "gsm8k", **settings: Any) -> ProblemsConfig:
    return ProblemsConfig(**{"benchmark": "lm_eval", "task": task, **settings})


def own_task(name: str, num_fewshot: int, files: dict[str, str]) -> Any:
    """The task as lm-eval's evaluator prepares it."""
    from lm_eval import tasks

    from dparallel.problems.lm_eval_index import names

    folder = Path(names().tasks[name]).parent
    manager = tasks.TaskManager(include_path=str(folder), include_defaults=False)
    data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    members = [{"task": name, **data}]
    [task] = manager.load({"group": "own", "task": members})["tasks"].values()
    task.set_config(key="num_fewshot", value=num_fewshot)
    task.set_fewshot_seed(seed=1234)
    return task


YAML = """
task: own
dataset_path: someone/sums
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
metric_list:
"""
