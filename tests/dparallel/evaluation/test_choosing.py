"""Which thresholds and students are chosen, and what is measured of them on the test problems."""

import json
from pathlib import Path
from typing import Any

import pytest

from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import Baseline, Sweep
from dparallel.evaluation.stage import run_stage
from dparallel.models.checkpoints import load_tokenizer, save_model
from tests.conftest import random_model
from tests.dparallel.evaluation.oracle import own_answers

SHAPE = {"gen_length": 12, "block_length": 6, "stop_at_eos": False}
REFERENCE = DecodingConfig(**SHAPE, rule="steps", steps=12)


def results_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_a_student_that_loses_the_accuracy_is_not_chosen(
    settings, inputs, store: Path, tmp_path: Path
) -> None:
    """The disturbed student is never correct: there is no default student, and all outputs state it."""
    entropy = {"teacher_sweeps": ("entropy",), "student_sweeps": ("entropy",)}
    only = {name: inputs[name] for name in ("teacher", "student/other")}
    manifest = run_stage(settings.model_copy(update=entropy), only, tmp_path / "out", store)
    results = results_in(tmp_path / "out")
    assert results["default_student"] is None
    assert manifest.details["default_student"] is None
    assert manifest.details["students_that_keep_the_accuracy"] == []
    assert "no student keeps the accuracy" in manifest.details["outcome"]
    assert manifest.metrics["headline/keeps_accuracy"] == 0.0
    assert "headline/tpf_ratio_to_teacher_best" not in manifest.metrics
    assert "No default student" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "certainty.png").is_file()


@pytest.mark.slow
def test_the_teacher_is_slowed_down_on_the_test_problems_until_it_keeps_the_accuracy(
    settings, inputs, store: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """On validation only threshold 0.1 is correct; on test 0.1 and 0.2 miss, and 0.35 keeps the accuracy."""
    sweep = Sweep(
        decoding=DecodingConfig(**SHAPE, rule="confidence", threshold=1.0), thresholds=(1.0, 0.1, 0.35, 0.2)
    )
    reckless = sweep.decodings()[1]
    misled = settings.model_copy(
        update={
            "validation": own_answers(
                tiny_checkpoint, tmp_path / "v.jsonl", reckless, count=6, split="validation"
            ),
            "sweeps": {"confidence": sweep},
            "teacher_sweeps": ("confidence",),
            "student_sweeps": ("confidence",),
            "fixed": {},
        }
    )
    run_stage(misled, {name: inputs[name] for name in ("teacher", "student/copy")}, tmp_path / "out", store)
    results = results_in(tmp_path / "out")
    teacher = [row for row in results["rows"] if (row["split"], row["model"]) == ("test", "teacher")]
    assert [row["threshold"] for row in teacher] == [None, 0.1, 0.2, 0.35]
    assert [row["accuracy"] >= 0.99 for row in teacher] == [True, False, False, True]
    best = results["headline"]["teacher_best"]
    assert best["threshold"] == 0.35
    assert best["tpf"] > results["reference"]["tpf"]
    shown, notes = (tmp_path / "out" / "table.md").read_text(encoding="utf-8").split("\n\n")
    assert len(shown.splitlines()) == 2 + 3  # the reference and two operating points
    assert "confidence 0.35" in notes
    assert "not in the table" in notes


def test_the_whole_sweep_can_be_decoded_on_the_test_problems(
    settings, inputs, store: Path, tmp_path: Path
) -> None:
    entropy = {"teacher_sweeps": ("entropy",), "student_sweeps": ("entropy",)}
    swept = settings.model_copy(update={"sweep_test": True, **entropy})
    only = {name: inputs[name] for name in ("teacher", "student/other")}
    manifest = run_stage(swept, only, tmp_path / "out", store)
    results = results_in(tmp_path / "out")
    test = [row for row in results["rows"] if row["split"] == "test"]
    assert len(test) == 2 + 3 + 3
    assert sum(row["operating_point"] for row in test) == 2
    assert {each["split"] for each in results["aup"]} == {"test"}
    assert (
        len((tmp_path / "out" / "table.md").read_text(encoding="utf-8").split("\n\n")[0].splitlines())
        == 2 + 4
    )
    assert manifest.counts["students"] == 1


@pytest.mark.slow
def test_each_student_has_its_own_sweeps_and_a_baseline_stands_beside(
    settings, inputs, store: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pipelined = {**SHAPE, "mode": "pipelined"}
    token_by_token = DecodingConfig(mode="autoregressive", gen_length=12)
    rival, block_causal = tmp_path / "rival", tmp_path / "block_causal"
    tokenizer = load_tokenizer(tiny_checkpoint)
    save_model(random_model(predicts_next=True, attention_pattern="causal"), rival, tokenizer=tokenizer)
    save_model(random_model(attention_pattern="block_causal"), block_causal, tokenizer=tokenizer)
    inputs = {**inputs, "student/other": str(block_causal)}
    by_pipeline = settings.model_copy(
        update={
            "fixed": {},
            "sweeps": {
                "entropy": Sweep(decoding=DecodingConfig(**SHAPE), thresholds=(1.0,)),
                "pipelined": Sweep(decoding=DecodingConfig(**pipelined), thresholds=(0.0, 1.0)),
            },
            "teacher_sweeps": ("entropy",),
            "student_sweeps": {"copy": ("entropy",), "other": ("pipelined",)},
            "baselines": {"rival": Baseline(model=str(rival), decoding=token_by_token)},
        }
    )
    with pytest.raises(ValueError, match=r"baselines \(baseline/rival\); got teacher, student/copy"):
        run_stage(by_pipeline, inputs, tmp_path / "out", store)
    inputs["baseline/rival"] = str(rival)
    run_stage(by_pipeline, inputs, tmp_path / "out", store)
    results = results_in(tmp_path / "out")
    measured = {(row["model"], row["method"], row["threshold"]) for row in results["rows"]}
    assert measured == {
        ("teacher", "one_token_per_step", None),
        ("teacher", "entropy", 1.0),
        ("student/copy", "entropy", 1.0),
        ("student/other", "pipelined", 0.0),
        ("student/other", "pipelined", 1.0),
        ("baseline/rival", "baseline", None),
    }
    measured_rival = [row for row in results["rows"] if row["model"] == "baseline/rival"]
    assert {row["split"] for row in measured_rival} == {"validation", "test"}
    assert not any(row["operating_point"] for row in measured_rival)
    assert "rival" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
