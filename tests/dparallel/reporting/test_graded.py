"""Reports and comparisons of benchmarks whose accuracy is a mean of values between 0 and 1."""

import json
from pathlib import Path

import pytest

from dparallel.reporting.compare import compare
from dparallel.reporting.report import write_report
from tests.dparallel.reporting.made import MEASUREMENTS, finished_benchmark


def test_a_report_by_hand(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Reference 1, 0.5, 0.5, 0, 1: mean 0.6; student 0.5, 0.5, 0.2, 1, 1: mean 0.64."""
    stage = finished_benchmark(
        tmp_path, tiny_checkpoint, reference="15501", swept="15501", student="55211", with_models=False
    )
    results = json.loads((stage / "results.json").read_text(encoding="utf-8"))
    [reference, _, student] = [row for row in results["rows"] if row["split"] == "test"]
    assert (reference["accuracy"], student["accuracy"]) == (0.6, 0.64)
    assert reference["graded"] == ["exact"]
    # squares 0.16 + 0.01 + 0.01 + 0.36 + 0.16 = 0.7: s.e. sqrt(0.7 / 4 / 5)
    assert reference["accuracy_stderr"] == pytest.approx(0.187083, abs=1e-6)
    write_report("sums", [("sums", stage)], tmp_path / MEASUREMENTS, {}, tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    [_, pair] = report["benchmarks"][0]["paired"]
    # differences -0.5, 0, -0.3, 1, 0: the sum 0.2; of the 8 signs of three, |sum| is at least 0.2 in all
    assert (pair["test"], pair["lost"], pair["gained"], pair["p_value"]) == ("sign_flip", 2, 1, 1.0)
    assert pair["difference"] == pytest.approx(0.04)
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "exact: the mean of values between 0 and the best one; ± is the sample standard deviation" in text
    assert "Wilson's 95 % interval" not in text
    assert "two-sided test by random signs" in text
    assert "McNemar" not in text
    assert "60.0 ± 18.7 [8.1, 100.0]" in text  # t of 4 degrees of freedom: 2.776445
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "A problem is lost if the value of exact is lower, and gained if it is higher" in page
    assert "is better on them than fast" in page
    assert '<span class="verdict unknown">20.0 %</span>' in page
    assert page.index("sums-0 <span") < page.index("sums-2 <span"), "the largest loss first"
    assert "equal value" in page


def test_a_comparison_of_values_with_truth_values(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Where one run has values between, right and wrong of the other one are 1 and 0."""
    for name, student in (("one", "11001"), ("two", "51001")):
        finished_benchmark(tmp_path, tiny_checkpoint, experiment=name, student=student, with_models=False)
    document = compare(["one", "two"], tmp_path)
    pairs = document.json["benchmarks"][0]["paired"]
    [pair] = [
        pair for pair in pairs if {pair[side]["model"] for side in ("before", "after")} == {"student/fast"}
    ]
    assert (pair["test"], pair["lost"], pair["gained"]) == ("sign_flip", 1, 0)
    assert pair["difference"] == pytest.approx(-0.1)
