"""Commit rules of a model, compared at equal accuracy."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks.rules import main
from dparallel.models.commit_rule import write_commit_rule
from tests.benchmarks.tables import cells
from tests.dparallel.rules.fitted import random_commit_rule

SHAPE = {"gen_length": 36, "block_length": 12}


def test_thresholds_are_chosen_on_validation_and_reported_on_test_problems(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    problems = {"benchmark": "coins", "count": 2}
    config = {
        "test": {**problems, "split": "test"},
        "validation": {**problems, "split": "validation"},
        "reference": {**SHAPE, "rule": "steps", "steps": 6},
        "sweeps": {
            "entropy": {"decoding": {**SHAPE, "rule": "entropy"}, "thresholds": [3.0]},
            "learned": {"decoding": {**SHAPE, "rule": "learned", "threshold": 0.5}, "thresholds": [0.2, 0.5]},
        },
        "teacher_sweeps": ["entropy", "learned"],
    }
    (tmp_path / "rules.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["rules", "--model", str(model), "--config", "rules.json"])
    assert main() == 2
    assert "holds no commit_rule.json" in capsys.readouterr().err
    write_commit_rule(model, random_commit_rule())
    assert main() == 0
    on_test, _, on_validation = capsys.readouterr().out.split("\n\n")[1:]
    titles, *rows = cells(on_test)
    assert titles == ["rule", "threshold", "accuracy %", "n", "NFE", "TPF"]
    assert [row[0] for row in rows] == ["reference", "entropy", "learned"]
    assert [row[0] for row in cells(on_validation)[1:]] == ["reference", "entropy", "learned", "learned"]
    monkeypatch.setattr(
        sys, "argv", [*sys.argv, "--set", "validation=null", "sweeps.learned.thresholds=[0.5]"]
    )
    assert main() == 2
    assert "has no validation problems" in capsys.readouterr().err
