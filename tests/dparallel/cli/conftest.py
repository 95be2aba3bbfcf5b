"""A random model of bytes, and real rows of the four benchmarks."""

import json
from pathlib import Path

import pytest

from dparallel.tiny.byte_level import LLADA, save_checkpoint
from tests.dparallel.problems.rows import DATA, rows


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("byte_level")
    save_checkpoint(folder, LLADA)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files of the published names; MBPP's first ten tasks are not measured."""
    folder = tmp_path_factory.mktemp("data")
    names = {"gsm8k": "gsm8k_test", "math500": "math500_test", "humaneval": "HumanEval"}
    for name, file in names.items():
        text = (DATA / f"{name}.jsonl").read_text(encoding="utf-8")
        (folder / f"{file}.jsonl").write_text(text, encoding="utf-8")
    others = [{**rows("mbpp")[0], "task_id": number} for number in range(1, 11)]
    lines = [json.dumps(row) + "\n" for row in [*others, *rows("mbpp")]]
    (folder / "mbpp.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder
