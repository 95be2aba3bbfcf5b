import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from dparallel.evaluation import plots
from dparallel.evaluation.certainty import CertaintyMap
from tests.dparallel.evaluation.test_selection import REFERENCE, SWEEP


def assert_has_ink(path: Path) -> None:
    picture = imread(path)[..., :3]
    assert min(picture.shape[:2]) > 400
    assert 0.005 < np.mean(picture.min(axis=-1) < 0.9) < 0.9


def test_names_for_readers() -> None:
    assert plots.plain("student/few_step") == "few step"
    assert plots.plain("teacher") == "teacher"


def test_tradeoff_is_drawn(tmp_path: Path) -> None:
    plots.tradeoff([REFERENCE, *SWEEP], ["entropy"], REFERENCE, 0.01, tmp_path / "t.png")
    assert_has_ink(tmp_path / "t.png")


@pytest.mark.parametrize("length", [8, 128])
def test_certainty_is_drawn_for_any_length(tmp_path: Path, length: int) -> None:
    maps = [
        CertaintyMap(
            label, torch.rand(steps, length), [position % steps for position in range(length)], ["w"] * length
        )
        for label, steps in (("before", 12), ("after", 3))
    ]
    plots.certainty(maps, 4, "title", tmp_path / "c.png")
    assert_has_ink(tmp_path / "c.png")


def test_loss_curves_are_drawn_from_what_the_students_logged(tmp_path: Path) -> None:
    for student, terms in {"a": {"loss": 1.0, "certainty": 0.5}, "b": {"loss": 2.0}}.items():
        lines = [
            {"train_step": step, **{name: value / step for name, value in terms.items()}}
            for step in (1, 2, 3)
        ]
        (tmp_path / f"{student}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plots.loss_curves({name: tmp_path / f"{name}.jsonl" for name in "ab"}, tmp_path / "l.png")
    assert_has_ink(tmp_path / "l.png")


def test_a_student_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"student a: .*nowhere\.jsonl is missing"):
        plots.loss_curves({"a": tmp_path / "nowhere.jsonl"}, tmp_path / "l.png")
