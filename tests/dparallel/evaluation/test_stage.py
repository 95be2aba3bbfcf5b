import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import Sweep
from dparallel.evaluation.bench import Bench, verdicts_key
from dparallel.evaluation.stage import run_stage
from dparallel.evaluation.store import Store
from dparallel.problems.scorer import Verdict
from dparallel.problems.scoring import SCORERS
from dparallel.stages import code
from dparallel.stages.manifest import StageError, verify
from tests.dparallel.evaluation.oracle import dataset, disturbed

SHAPE = {"gen_length": 12, "block_length": 6, "stop_at_eos": False}
REFERENCE = DecodingConfig(**SHAPE, rule="steps", steps=12)


def results_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_everything_is_measured_chosen_and_written(finished: Path) -> None:
    manifest = verify(finished, "benchmark")
    assert set(manifest.files) == {"results.json", "table.md", "tradeoff.png", "certainty.png"}
    results = results_in(finished)
    rows = results["rows"]
    validation = [row for row in rows if row["split"] == "validation"]
    test = [row for row in rows if row["split"] == "test"]
    # one reference, one fixed, and 2 + 3 thresholds of each of three models
    assert len(validation) == 2 + 3 * 5
    # one reference, one fixed, and the operating points of two sweeps of each model, ...
    assert [row["operating_point"] for row in test[:8]] == [False] * 2 + [True] * 6
    # ... and what is slower in the teacher's sweep by entropy, which never keeps the accuracy
    assert {(row["model"], row["method"], row["operating_point"]) for row in test[8:]} == {
        ("teacher", "entropy", False)
    }
    assert results["reference"] == test[0]
    assert (test[0]["accuracy"], test[0]["nfe"]) == (1.0, 12.0)

    for point in results["chosen"]:
        sweep = [
            row for row in validation if (row["model"], row["method"]) == (point["model"], point["method"])
        ]
        kept = [row for row in sweep if row["accuracy"] >= 1.0 - 0.01]
        assert point["qualifies"] == bool(kept)
        best = max(row["tpf"] for row in kept) if kept else max(row["accuracy"] for row in sweep)
        assert point["tpf" if kept else "accuracy"] == best
        assert [row["threshold"] for row in sweep if row["operating_point"]] == [point["threshold"]]

    assert results["default_student"] == manifest.details["default_student"]
    # only the copy responds like its teacher, and only if it commits one token at a time
    qualifying = [row for row in results["chosen"] if row["qualifies"] and row["model"] != "teacher"]
    assert [(row["model"], row["method"]) for row in qualifying] == [("student/copy", "confidence")]
    assert results["default_student"] == "student/copy"
    assert results["headline"]["student"]["method"] == "confidence"
    assert {(each["model"], each["method"]) for each in results["aup"]} == {
        (model, method)
        for model in ("teacher", "student/copy", "student/other")
        for method in ("confidence", "entropy")
    }
    assert {each["split"] for each in results["aup"]} == {"validation"}


def test_a_student_equal_to_the_teacher_measures_the_same(finished: Path) -> None:
    rows = results_in(finished)["rows"]

    def curve(model: str) -> list:
        timed = ("tps", "latency", "model", "keys", "measured_on", "reused")
        return [
            {key: value for key, value in row.items() if key not in timed}
            for row in rows
            if row["model"] == model
            and row["method"] == "entropy"
            and (row["split"] == "validation" or row["operating_point"])
        ]

    assert curve("student/copy") == curve("teacher")
    assert curve("student/other") != curve("teacher")


def test_metrics_are_flat_and_agree_with_the_results(finished: Path) -> None:
    manifest = verify(finished)
    results = results_in(finished)
    assert manifest.metrics["teacher/one_token_per_step/tpf"] == results["reference"]["tpf"]
    assert manifest.metrics["headline/nfe_ratio"] == results["headline"]["nfe_ratio"]
    student, best = results["headline"]["student"], results["headline"]["teacher_best"]
    assert results["headline"]["tpf_ratio_to_teacher_best"] == pytest.approx(student["tpf"] / best["tpf"])
    assert manifest.metrics["student/copy/entropy/nfe"] > 0
    assert "teacher/few_step/accuracy" in manifest.metrics


def test_the_store_holds_the_text_behind_every_number(finished: Path, store: Path) -> None:
    for row in results_in(finished)["rows"]:
        samples, [verdicts] = Store(store).samples(row["keys"]["samples"]), row["keys"]["verdicts"]
        judged = Store(store).verdicts(verdicts)
        assert judged is not None
        assert len(samples) == len(judged) == row["samples"] == 6
        assert sum(judged["exact"].to_pylist()) / 6 == row["accuracy"] == row["metrics"]["exact"]
        assert sum(samples["nfe"].to_pylist()) / 6 == pytest.approx(row["nfe"])
        assert judged["response"].to_pylist() == samples["text"].to_pylist()
        right = [
            a.strip() == b.strip()
            for a, b in zip(judged["response"].to_pylist(), judged["reference"].to_pylist(), strict=True)
        ]
        assert right == judged["exact"].to_pylist()


def test_a_finished_benchmark_is_not_redone(finished: Path, settings, inputs, store: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*")}
    assert run_stage(settings, inputs, finished, store) == verify(finished)
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*")} == before


def test_a_student_that_equals_the_teacher_is_not_decoded(finished: Path) -> None:
    """The samples of equal models have equal keys."""
    rows = results_in(finished)["rows"]
    keys = {
        model: {row["keys"]["samples"] for row in rows if row["model"] == model} for model in inputs_of(rows)
    }
    assert keys["student/copy"] <= keys["teacher"]
    assert not keys["student/other"] & keys["teacher"]


def inputs_of(rows: list[dict[str, Any]]) -> set[str]:
    return {row["model"] for row in rows}


def test_another_loss_threshold_or_batch_size_decodes_only_what_is_new(
    finished: Path, settings, inputs, store: Path, tmp_path: Path, decoded: list[int]
) -> None:
    generous = settings.model_copy(update={"max_loss": 1.0, "batch_size": 2})
    run_stage(generous, inputs, tmp_path / "generous", store)
    slowest, fastest = 6 * 1, 6 * 2 * 2  # on the test problems: two models, two sweeps
    assert sum(decoded) <= fastest
    decoded.clear()
    run_stage(generous, inputs, tmp_path / "again", store)
    assert decoded == []
    again, generous_rows = (results_in(tmp_path / name)["rows"] for name in ("again", "generous"))
    assert {(row["reused"], *row["measured_on"]) for row in again} <= {
        (row["samples"], *row["measured_on"]) for row in generous_rows
    }, "all of them, with the days of the run that decoded them"
    for row in again:
        del row["reused"]
    assert again == [{name: row[name] for name in row if name != "reused"} for row in generous_rows]
    table = (tmp_path / "again" / "table.md").read_text(encoding="utf-8")
    assert table.count(" (reused) |") == len([line for line in table.splitlines() if "| " in line]) - 1

    sweeps = {
        **settings.sweeps,
        "entropy": Sweep(decoding=DecodingConfig(**SHAPE), thresholds=(0.0, 0.5, 1.0, 10.0)),
    }
    run_stage(settings.model_copy(update={"sweeps": sweeps}), inputs, tmp_path / "finer", store)
    assert sum(decoded) == 6 * 2 + slowest, "two models on validation; the slower teacher on test"


def test_another_student_decodes_no_teacher(
    finished: Path, settings, inputs, store: Path, tiny_checkpoint: Path, tmp_path: Path, decoded: list[int]
) -> None:
    """As with another seed: the teacher's samples are reused."""
    third = disturbed(tiny_checkpoint, tmp_path / "third", seed=2)
    only = {"teacher": inputs["teacher"], "student/third": str(third)}
    run_stage(settings, only, tmp_path / "out", store)
    rows = [row for row in results_in(tmp_path / "out")["rows"] if row["model"] == "student/third"]
    assert sum(decoded) == 6 * len(rows)


def test_a_mended_scorer_judges_again_and_decodes_nothing(
    finished: Path, settings, inputs, store: Path, tmp_path: Path, decoded: list[int], monkeypatch
) -> None:
    def lenient(problems: Any, responses: Any) -> list[Verdict]:
        return [Verdict({"exact": True}) for _ in problems]

    mended = replace(SCORERS["exact"], version=99, score=lenient)
    monkeypatch.setitem(SCORERS, "exact", mended)
    run_stage(settings, inputs, tmp_path / "out", store)
    validation = [row for row in results_in(tmp_path / "out")["rows"] if row["split"] == "validation"]
    assert {row["accuracy"] for row in validation} == {1.0}
    assert set(decoded) <= {6}
    assert len(decoded) <= 4, "none of validation: only other operating points on the test problems"


def test_a_finished_benchmark_is_judged_again_by_another_version_of_its_scorer(
    finished: Path, settings, inputs, store: Path, tmp_path: Path, decoded: list[int], monkeypatch
) -> None:
    """The folder's key has the scorer's code, but neither the version that stands for a library nor this
    machine's environment."""
    folder = shutil.copytree(finished, tmp_path / "benchmark")
    before = run_stage(settings, inputs, folder, store)
    assert run_stage(settings, inputs, folder, store) == before

    def lenient(problems: Any, responses: Any) -> list[Verdict]:
        return [Verdict({"exact": True}) for _ in problems]

    for changes in ({"version": 99, "score": lenient}, {"environment": lambda: "another sandbox"}):
        monkeypatch.setitem(SCORERS, "exact", replace(SCORERS["exact"], **changes))
        after = run_stage(settings, inputs, folder, store)
        assert after.details["judges"] != before.details["judges"]
        assert set(after.details["measurements"]).isdisjoint(
            name for name in before.details["measurements"] if name.startswith("verdicts")
        )
        before = after
    assert {row["accuracy"] for row in results_in(folder)["rows"]} == {1.0}
    assert set(decoded) <= {6}, "at most other operating points"


def test_a_corrected_reference_judges_again_and_decodes_nothing(
    finished: Path, settings, inputs, store: Path, tmp_path: Path, decoded: list[int]
) -> None:
    file = tmp_path / "validation.jsonl"
    lines = [
        json.loads(line)
        for line in Path(settings.validation.sources[0].path).read_text(encoding="utf-8").splitlines()
    ]
    lines[0]["reference"] = "something else"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    corrected = settings.model_copy(update={"validation": dataset(file), "max_loss": 0.2})
    run_stage(corrected, inputs, tmp_path / "out", store)
    validation = [row for row in results_in(tmp_path / "out")["rows"] if row["split"] == "validation"]
    assert validation[0]["accuracy"] == pytest.approx(5 / 6), "of the reference decoding, which was 1"
    assert set(decoded) <= {6}
    assert len(decoded) <= 4, "none of validation: only other operating points on the test problems"


def test_verdicts_follow_the_scorers_code_and_all_that_it_reads(
    settings, inputs, store: Path, monkeypatch
) -> None:
    bench = Bench(settings, inputs, store)
    problems, protocol, scorer = bench.problems["test"], settings.test.protocol, SCORERS["exact"]

    def key() -> str:
        return verdicts_key("samples", problems, protocol, scorer)

    others = [
        verdicts_key("other samples", problems, protocol, scorer),
        verdicts_key("samples", problems, protocol.model_copy(update={"version": 2}), scorer),
        verdicts_key("samples", problems, protocol.model_copy(update={"stops": ("\n",)}), scorer),
        verdicts_key("samples", problems, protocol, replace(scorer, version=99)),
        verdicts_key("samples", problems, protocol, replace(scorer, in_process=False)),
        verdicts_key("samples", problems, protocol, replace(scorer, in_process=False, seconds=5.0)),
    ]
    before = key()
    assert len({before, *others}) == 7
    assert verdicts_key("samples", problems, protocol, replace(scorer, seconds=5.0)) == before
    problems = [replace(problem, extra={"tests": "assert True"}) for problem in problems]
    with_tests = key()
    monkeypatch.setattr("dparallel.evaluation.bench.code_digest", lambda modules: str(sorted(modules)))
    by_code = key()
    assert len({before, with_tests, by_code}) == 3
    monkeypatch.setitem(code.SCORERS, "exact", ("problems/another.py",))
    assert key() != by_code


def test_damaged_samples_of_a_finished_benchmark_are_named_with_the_remedy(
    finished: Path, settings, inputs, store: Path, tmp_path: Path, decoded: list[int]
) -> None:
    mine, folder = tmp_path / "measurements", tmp_path / "out"
    shutil.copytree(store, mine)
    done = run_stage(settings, inputs, folder, mine)
    assert decoded == []
    name = next(name for name in done.details["measurements"] if name.startswith("samples/"))
    whole = (mine / name).read_bytes()
    (mine / name).write_bytes(whole[:-100])
    with pytest.raises(StageError, match=f"{name} was damaged or edited, .*: delete .*{name} and .*out"):
        run_stage(settings, inputs, folder, mine)
    shutil.rmtree(folder)
    with pytest.raises(StageError, match=f"{name} is damaged: delete it to measure again"):
        run_stage(settings, inputs, folder, mine)
    (mine / name).unlink()
    assert run_stage(settings, inputs, folder, mine).metrics.keys() == done.metrics.keys()
    assert decoded == [6]


def test_students_without_sweeps_are_named(settings, inputs, store: Path, tmp_path: Path) -> None:
    lacking = settings.model_copy(update={"student_sweeps": {"copy": ("entropy",)}})
    with pytest.raises(ValueError, match="student_sweeps lists copy, and not other: give a"):
        run_stage(lacking, inputs, tmp_path / "out", store)


def test_validation_and_test_problems_must_not_overlap(settings, inputs, store: Path, tmp_path: Path) -> None:
    mixed = settings.model_copy(update={"validation": settings.test})
    with pytest.raises(ValueError, match="benchmark.test and benchmark.validation share 6 prompts"):
        run_stage(mixed, inputs, tmp_path / "out", store)


@pytest.mark.parametrize("names", [["teacher"], ["student/copy"], ["teacher", "student/copy", "pupil"]])
def test_teacher_and_students_must_be_given(
    settings, inputs, store: Path, tmp_path: Path, names: list[str]
) -> None:
    given = {name: inputs.get(name, "") for name in names}
    with pytest.raises(ValueError, match=f"one or more 'student/<name>' .*; got {', '.join(names)}"):
        run_stage(settings, given, tmp_path / "out", store)


def test_two_methods_of_one_name_are_refused(settings, inputs, store: Path, tmp_path: Path) -> None:
    twice = settings.model_copy(update={"fixed": {"entropy": settings.fixed["few_step"]}})
    with pytest.raises(ValueError, match="share the name entropy"):
        run_stage(twice, inputs, tmp_path / "out", store)


def test_a_problems_file_that_changed_is_refused(settings, inputs, store: Path, tmp_path: Path) -> None:
    folder, path = tmp_path / "out", tmp_path / "test.jsonl"
    shutil.copy(settings.test.sources[0].path, path)
    moved = settings.model_copy(update={"test": dataset(path), "teacher_sweeps": (), "fixed": {}})
    only = {name: inputs[name] for name in ("teacher", "student/copy")}
    run_stage(moved, only, folder, store)
    path.write_text("\n".join(path.read_text(encoding="utf-8").splitlines()[:-1]), encoding="utf-8")
    with pytest.raises(
        StageError, match=r"test\.jsonl: changed since its problems were measured .* or delete"
    ):
        run_stage(moved, only, folder, store)
    for record in (store / "data").glob("*.json"):
        record.unlink()
    with pytest.raises(StageError, match="made from other problems"):
        run_stage(moved, only, folder, store)
