import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from dparallel.evaluation import plots
from dparallel.evaluation.certainty import CertaintyMap
from dparallel.evaluation.metrics import wilson
from tests.dparallel.evaluation.test_selection import REFERENCE, SWEEP, row

DPI = plots.DPI  # as used outside of tests: read before `coarse_pictures` lowers it


@pytest.fixture(autouse=True)
def full_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "DPI", DPI)


def assert_has_ink(path: Path) -> None:
    picture = imread(path)[..., :3]
    assert min(picture.shape[:2]) > 400
    assert 0.005 < np.mean(picture.min(axis=-1) < 0.9) < 0.9


def listed(data: Any) -> list:
    return np.asarray(data).round(6).tolist()


def test_names_for_readers() -> None:
    assert plots.plain("student/few_step") == "few step"
    assert plots.plain("teacher") == "teacher"


def test_tradeoff_is_drawn(tmp_path: Path) -> None:
    plots.tradeoff([REFERENCE, *SWEEP], ["entropy"], 0.01, tmp_path / "t.png")
    assert_has_ink(tmp_path / "t.png")


def test_tradeoff_lines_are_tpf_and_accuracy_with_error_bars() -> None:
    chosen = replace(SWEEP[1], operating_point=True)
    rows = [REFERENCE, SWEEP[2], SWEEP[0], chosen]  # in any order
    axes = plots.tradeoff_figure(rows, ["entropy"], max_loss=0.01).axes[0]
    drawn = {container.get_label(): container for container in axes.containers}
    assert set(drawn) == {"teacher, one token per step", "a, entropy"}
    line, _, (bars,) = drawn["a, entropy"]
    assert listed(line.get_xydata()) == [[3, 98.5], [4, 97], [5, 96.9]]
    low, high = wilson(985, 1000)  # whose standard error would be 0.4
    assert listed(bars.get_segments()[0]) == listed([[3, low * 100], [3, high * 100]])
    assert listed(drawn["teacher, one token per step"][0].get_xydata()) == [[1, 98]]
    (circle,) = (each for each in axes.collections if each.get_label() == "operating point")
    assert listed(circle.get_offsets()) == [[4, 97]]
    (limit,) = (each for each in axes.lines if str(each.get_label()).startswith("lowest allowed"))
    assert listed(limit.get_ydata()) == [97, 97]


def luminance(colour: str) -> float:
    """WCAG's relative luminance."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("page", ["#FFFFFF", "#191D25"], ids=["light", "dark"])
def test_every_colour_stands_out_on_a_light_and_on_a_dark_page(page: str) -> None:
    assert len(set(plots.COLOURS)) == len(set(plots.MARKERS)) == 12
    for colour in plots.COLOURS:
        dark, light = sorted((luminance(colour), luminance(page)))
        assert (light + 0.05) / (dark + 0.05) >= 3, colour


def test_twenty_models_with_three_methods_each_look_different() -> None:
    models = ["teacher", *(f"student/{number}" for number in range(20))]
    rows = [
        row(model, method, 0.5, 0.9, 2.0 + place)
        for model in models
        for place, method in enumerate(["few_step", "dual_cache", "confidence", "entropy"])
    ]
    figure = plots.tradeoff_figure([REFERENCE, *rows], ["confidence", "entropy"], max_loss=0.01)
    figure.draw_without_rendering()
    [legend] = figure.legends
    assert figure.bbox.containsy(legend.get_window_extent().y0), "the whole legend is seen"
    lines = [container[0] for container in figure.axes[0].containers]
    assert len(lines) == 1 + 4 * len(models)
    swept = [line for line in lines if line.get_linestyle() != "None"]
    looks = {(line.get_color(), line.get_marker(), str(line._unscaled_dash_pattern)) for line in swept}
    assert len(looks) == len(swept) == 2 * len(models)
    single = {(line.get_color(), line.get_marker()) for line in lines[: 4 * 12] if line not in swept}
    assert len(single) == 1 + 2 * 12, "the reference, and both fixed decodings of twelve models"


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


def test_certainty_shows_what_is_still_masked() -> None:
    probability = torch.tensor([[0.1, 0.2], [0.3, 0.4]])  # (steps, positions)
    one = CertaintyMap("a", probability, [0, 1], ["first", "second"])
    shown: Any = plots.certainty_figure([one], 1, "title").axes[0].images[0].get_array()
    assert shown.mask.tolist() == [[False, True], [False, False]]  # position 0 is committed at step 0
    np.testing.assert_allclose(np.asarray(shown.filled(0)), np.array([[0.1, 0], [0.2, 0.4]]))


def test_loss_curves_have_a_panel_for_each_quantity_and_a_line_for_each_student() -> None:
    curves = {
        "a": [{"train_step": 1, "loss": 4.0, "certainty": 0.5}, {"train_step": 3, "loss": 2.0}],
        "b": [{"train_step": 2, "loss": 3.0}],
    }
    loss, certainty = plots.loss_figure(curves).axes
    assert (loss.get_title(), certainty.get_title()) == ("loss", "certainty term (nats)")
    assert [listed(line.get_xydata()) for line in loss.lines] == [[[1, 4], [3, 2]], [[2, 3]]]
    assert listed(certainty.lines[0].get_xydata()) == [[1, 0.5]]


def test_loss_curves_are_drawn_from_what_the_students_logged(tmp_path: Path) -> None:
    for student, terms in {"a": {"loss": 1.0, "certainty": 0.5}, "b": {"loss": 2.0}}.items():
        lines = [
            {"train_step": step, **{name: value / step for name, value in terms.items()}}
            for step in (1, 2, 3)
        ]
        (tmp_path / f"{student}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
        )
    plots.loss_curves({name: tmp_path / f"{name}.jsonl" for name in "ab"}, tmp_path / "l.png")
    assert_has_ink(tmp_path / "l.png")


def test_a_student_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"student a: .*nowhere\.jsonl is missing"):
        plots.loss_curves({"a": tmp_path / "nowhere.jsonl"}, tmp_path / "l.png")


def test_characters_without_a_glyph_are_dots() -> None:
    assert plots.printable("a b\r\n\tä∎") == "a b···ä∎"
