"""Comparisons of past runs: what names a run, what is warned of, and the paired numbers by hand."""

import json
import re
import shutil
from pathlib import Path

import pytest

from dparallel.cli.main import main
from dparallel.reporting.compare import compare
from dparallel.reporting.find import RunError, find_run
from dparallel.reporting.read import benchmark_name, read_benchmark
from dparallel.reporting.report import report_folder, write_report
from tasks.tracking.records import Record, write_record
from tests.dparallel.reporting.made import config, finished_benchmark, unfinished
from tests.dparallel.reporting.made_runs import made


@pytest.fixture(scope="module")
def runs(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experiments with the same problems; the second student solves 11101 instead of 11001 of them."""
    folder = tmp_path_factory.mktemp("runs")
    finished_benchmark(folder, tiny_checkpoint)
    finished_benchmark(folder, tiny_checkpoint, experiment="longer", student="11101")
    return folder


def test_paired_numbers_by_hand(runs: Path) -> None:
    found = compare(["sums", "longer"], runs)
    assert found.warnings == []
    [section] = found.json["benchmarks"]
    assert [row["run"] for row in section["rows"]] == ["sums"] * 3 + ["longer"] * 3
    between = [pair for pair in section["paired"] if pair["before"]["run"] != pair["after"]["run"]]
    assert [(pair["before"]["model"], pair["after"]["method"]) for pair in between] == [
        ("teacher", "one_token_per_step"),
        ("teacher", "entropy"),
        ("student/fast", "entropy"),
    ]
    student = between[-1]
    counts = [student[name] for name in ("problems", "both", "lost", "gained", "neither")]
    assert counts == [5, 3, 0, 1, 1]
    assert student["difference"] == pytest.approx(0.2)
    assert student["p_value"] == 1
    low, high = student["interval"]
    assert low < 0 < 0.2 < high


def test_what_runs_were_started_with_is_compared(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    for experiment, overrides in {"sums": [], "longer": ["training.epochs=3"]}.items():
        [file] = (tmp_path / "runs" / experiment).glob("benchmark-*/manifest.json")
        manifest = json.loads(file.read_text(encoding="utf-8"))
        manifest["origin"] = {"config": "a.yaml", "overrides": overrides}
        file.write_text(json.dumps(manifest), encoding="utf-8")
    warnings = compare(["sums", "longer"], tmp_path / "runs").warnings
    assert len(warnings) == 1
    assert warnings[0].endswith("sums was started with a.yaml, longer with a.yaml training.epochs=3")


def test_the_comparison_is_printed_and_written(runs: Path, tmp_path: Path, capsys) -> None:
    assert main(["compare", "sums", "longer", "--runs", str(runs), "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# sums and longer\n")
    assert "| longer" in text
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"comparison.html", "comparison.json", "comparison.md", "tradeoff-sums.png"}
    assert str(tmp_path / "out" / "comparison.html") in text
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert "Samples: sums, fast, entropy 0.5 and longer, fast, entropy 0.5" in page
    assert "gained (1 of 1)" in page
    assert 'id="replay"' not in page, "nothing is lost, so that no decoding is replayed"


def test_regressions_have_replays_where_the_models_are_there(
    runs: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Of `longer` and `sums`, one problem is lost; both decodings are replayed, each by its run's model."""
    page = compare(["longer", "sums"], runs).html()
    regressions = page[page.index("Regressions:") : page.index("Samples:")]
    assert re.findall(r"#replay-(\d)", regressions) == ["0", "1"]
    data = re.search(r'id="trace">(.*?)</script>', page)
    assert data is not None
    subjects = [row["subject"] for row in json.loads(data[1])["rows"]]
    assert subjects == [
        "sums, sums-2: longer, fast, entropy 0.5, right",
        "sums, sums-2: sums, fast, entropy 0.5, wrong",
    ]
    mine = tmp_path / "runs"
    finished_benchmark(mine, tiny_checkpoint, with_models=False)
    finished_benchmark(mine, tiny_checkpoint, experiment="longer", student="11101")
    page = compare(["longer", "sums"], mine).html()
    regressions = page[page.index("Regressions:") : page.index("Samples:")]
    assert re.findall(r"#replay-(\d)", regressions) == ["0"], "the other run has not recorded its models"


def test_models_of_an_experiment_that_was_moved_are_found_in_it(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = tmp_path / "runs" / "sums" / "merging-fast-0123456789"
    shutil.copytree(tiny_checkpoint, model)
    stage = finished_benchmark(tmp_path / "runs", model)
    assert read_benchmark("sums", stage).models == {"teacher": str(model), "student/fast": str(model)}
    (tmp_path / "runs").rename(tmp_path / "moved")
    moved = tmp_path / "moved" / "sums"
    assert read_benchmark("sums", moved / stage.name).models["teacher"] == str(moved / model.name)
    shutil.rmtree(moved / model.name)
    assert read_benchmark("sums", moved / stage.name).models == {}


def test_a_comparison_says_which_times_were_reused_and_when_they_were_measured(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    finished_benchmark(tmp_path, tiny_checkpoint, day=24)
    finished_benchmark(tmp_path, tiny_checkpoint, experiment="longer", day=26, reused=2)
    found = compare(["sums", "longer"], tmp_path)
    for text in (found.markdown(), found.html()):
        assert text.count("2026-11-24") == 3
        assert text.count("2026-11-26 (2 of 5 reused)") == 3
    [section] = found.json["benchmarks"]
    assert {(*row["times"]["measured_on"], row["times"]["reused"]) for row in section["rows"]} == {
        ("2026-11-24", 0),
        ("2026-11-26", 2),
    }


def record(runs: Path, run_id: str | None, folder: Path | None = None, files: tuple[Path, ...] = ()) -> None:
    """A record of MLflow's run as an upload leaves it."""
    write_record(
        runs / "sums" / "tracking" / f"{run_id}.json",
        Record(
            id="a-record",
            parent=None,
            experiment="sums",
            stage="any",
            name="some work",
            config={},
            folder=None if folder is None else str(folder),
            files=[str(file) for file in files],
            started=0,
            run_id=run_id,
        ),
    )


def test_a_run_is_named_in_many_ways(tiny_checkpoint: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    stage = finished_benchmark(runs, tiny_checkpoint)
    stages = [(benchmark_name(stage), stage)]
    report = report_folder(stage.parent, stages)
    files = write_report("sums", stages, runs / "measurements", {}, report)
    record(runs, "0" * 32, folder=stage)
    record(runs, "1" * 32, files=tuple(files))
    record(runs, "2" * 32, folder=tmp_path / "gone" / stage.name)
    (runs / "sums" / "tracking" / "damaged.json").write_text("{", encoding="utf-8")
    for given in ("sums", str(stage.parent), str(stage), str(report), "0" * 32, "1" * 32, "2" * 32):
        assert find_run(given, runs).stages == stages, given
        assert find_run(given, runs).experiment == "sums"


@pytest.mark.parametrize("damage", [{"folder": 5}, {"files": 5}, {"files": [None, 5]}, {"folder": ["a"]}])
def test_a_damaged_record_of_a_run_is_refused(tmp_path: Path, damage: dict[str, object]) -> None:
    file = tmp_path / "sums" / "tracking" / "a.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"run_id": "a" * 32, **damage}), encoding="utf-8")
    with pytest.raises(RunError, match="without results of a benchmark"):
        find_run("a" * 32, tmp_path)


def test_the_home_of_an_unknown_user_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is neither a folder"):
        find_run("~nobody-has-this-name/sums", tmp_path)


def test_the_latest_of_several_results_is_taken_and_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    older = finished_benchmark(tmp_path, tiny_checkpoint, key="ffffffffff")
    newer = finished_benchmark(tmp_path, tiny_checkpoint, key="aaaaaaaaaa")
    manifest = json.loads((older / "manifest.json").read_text(encoding="utf-8"))
    manifest["finished_at"] = "2020-01-01T00:00:00+00:00"
    (older / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    found = find_run("sums", tmp_path)
    assert found.stages == [("sums", newer)]
    assert "holds 2 finished benchmarks sums: the latest, benchmark-aaaaaaaaaa, is taken" in found.notes[0]
    both = compare([str(older), str(newer)], tmp_path)
    assert both.title == "sums/benchmark-ffffffffff and sums/benchmark-aaaaaaaaaa"


def test_settings_that_differ_are_listed(tiny_checkpoint: Path, tmp_path: Path, capsys) -> None:
    """Of the benchmark and of what its student was made from, whatever folders they lie in."""
    recipe = {"masking": "random", "block_length": 12}
    stated = {
        "one": ({"train_steps": 5, "lora": {"rank": 4}}, recipe, {"number": 1}),
        "two": ({"train_steps": 9, "lora": {"rank": 4}}, {**recipe, "block_length": {"start": 1}}, {}),
    }
    for experiment, (training, of_student, recorded) in stated.items():
        home = tmp_path / experiment
        first = made(home, "trajectories", 1, config={"batch": 1, **recorded})
        settings = {"training": training, "recipe": of_student}
        second = made(home, "training-fast", 1, {"trajectories": first}, config=settings)
        merged = made(home, "merging-fast", 1, {"training": second})
        (merged / "config.json").touch()
        changes = {"batch_size": 8} if experiment == "two" else {}
        finished_benchmark(
            tmp_path, tiny_checkpoint, experiment=experiment, merged=merged, settings=config(**changes)
        )
    found = compare(["one", "two"], tmp_path)
    assert {row["setting"]: list(row["values"].items()) for row in found.json["settings"]} == {
        "benchmarks.sums.batch_size": [("one", "64"), ("two", "8")],
        "students.fast.block_length": [("one", "12"), ("two", '{"start": 1}')],
        "training.train_steps": [("one", "5"), ("two", "9")],
        "trajectories.number": [("one", "1"), ("two", "-")],
    }
    text = found.markdown()
    assert re.search(r"\n\| students\.fast\.block_length +\| 12 +\| {\"start\": 1} +\|\n", text)
    assert "<span>Settings that differ</span>" in found.html()
    shutil.rmtree(next((tmp_path / "two").glob("training-*")))
    left = compare(["one", "two"], tmp_path).json["settings"]
    assert [row["setting"] for row in left] == ["benchmarks.sums.batch_size"], "of the others one is unknown"
    assert compare(["one", "two"], tmp_path).warnings == [], "none of them matters to the numbers' comparison"


def test_what_differs_is_warned_of(runs: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    mine = tmp_path / "runs"
    shutil.copytree(runs, mine)
    stage = finished_benchmark(
        mine,
        tiny_checkpoint,
        experiment="elsewhere",
        hardware="another machine",
        first_problem=2,
        settings=config(prompt="Say: {prompt}"),
    )
    manifest = json.loads((stage / "manifest.json").read_text(encoding="utf-8"))
    manifest["code"], manifest["versions"]["dparallel"] = "c00000000000", "9.9"
    (stage / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    found = compare(["sums", "elsewhere"], mine)
    problems, devices, protocols, versions = found.warnings
    assert "(5 of sums, 5 of elsewhere, 3 in both)" in problems
    assert "measured on different devices: sums on a machine; elsewhere on another machine. Lat" in devices
    assert "different protocols (prompt)" in protocols
    assert "dparallel 0.1.0 and 9.9; code c" in versions
    assert all(warning in found.html() for warning in ("Before you compare", "another machine"))
    assert found.markdown().count("**Before you compare**") == 4
    pairs = [pair for pair in found.json["benchmarks"][0]["paired"] if pair["before"]["run"] == "sums"]
    assert {pair["problems"] for pair in pairs if pair["after"]["run"] == "elsewhere"} == {3}


def test_accuracies_of_different_metrics_are_not_tested(
    runs: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "runs"
    shutil.copytree(runs, mine)
    finished_benchmark(mine, tiny_checkpoint, experiment="boxes", student="11111", metric="boxed")
    found = compare(["sums", "boxes"], mine)
    [warning] = found.warnings
    assert (
        "the accuracy of sums is the metric exact, that of boxes is boxed: accuracies and AUP do" in warning
    )
    [section] = found.json["benchmarks"]
    between = [pair for pair in section["paired"] if pair["before"]["run"] != pair["after"]["run"]]
    assert [(pair["test"], pair["difference"], pair["p_value"]) for pair in between] == [
        ("none", None, None)
    ] * 3
    within = [pair for pair in section["paired"] if pair["before"]["run"] == pair["after"]["run"]]
    assert {pair["test"] for pair in within} == {"mcnemar"}
    assert "accuracies of different metrics are not compared" in found.markdown()
    assert "judged by exact and the other one by boxed" in found.html()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judges": "of today"}, "judged by other versions of their scorers"),
        ({"settings": config(max_loss=0.1)}, r"losses of accuracy \(50 points in sums, 10 in other\)"),
        ({"sandbox": "bubblewrap"}, r"different sandboxes \(none, bubblewrap\)"),
        ({"batch_size": 7}, r"different batch sizes \(4; 7\): TPS of sums and other do not compare"),
    ],
)
def test_every_difference_is_one_warning(
    runs: Path, tiny_checkpoint: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    mine = tmp_path / "runs"
    shutil.copytree(runs, mine)
    finished_benchmark(mine, tiny_checkpoint, experiment="other", **changes)
    [warning] = compare(["sums", "other"], mine).warnings
    assert re.search(message, warning)


def test_sweeps_on_different_problems_have_no_common_aup(
    runs: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "runs"
    shutil.copytree(runs, mine)
    finished_benchmark(mine, tiny_checkpoint, experiment="third", settings=config(sweep_test=True))
    found = compare(["sums", "longer", "third"], mine)
    assert [warning.split(": ")[1][:40] for warning in found.warnings] == [
        "sums measured whole sweeps on validation"
    ]
    [section] = found.json["benchmarks"]
    assert section["aup"] is None
    assert {row["aup"] for row in section["rows"]} == {None}
    assert {row["run"] for row in section["rows"]} == {"sums", "longer", "third"}
    assert found.html().count("Samples: sums, fast") == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["sums"], "give two or more runs"),
        (["sums", "sums"], "are the same run .*: give each run once"),
        (["sums", "nowhere"], "nowhere is neither a folder, nor an experiment in .* --runs"),
        (["sums", "longr"], "longr is neither .*: did you mean 'longer'\\? give a folder, or"),
        (["sums/benchmark-012345678", "longer"], "did you mean 'sums/benchmark-0123456789'\\? give"),
        (["sums", "empty"], "empty is neither an experiment nor a report nor a benchmark stage"),
        (["sums", "begun"], "benchmark-0123456789 is not finished"),
        (["sums", "begun/benchmark-0123456789"], "is not finished .*: give the command"),
        (["sums", "other"], "no problem in common .*: compare runs with the same test problems"),
        (["sums", "runs/measurements"], "measurements holds samples and verdicts alone, as `dparallel eval`"),
        (["sums", "runs"], "runs is a folder of runs: give experiments in it; .* one experiment"),
        (["sums", "a.json"], "a.json is a file: give the folder of an experiment"),
        (["sums", "5" * 32], "'some work' of sums, without results of a benchmark: give the run of"),
    ],
)
def test_what_cannot_be_compared_is_one_line_with_the_remedy(
    runs: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys,
    monkeypatch: pytest.MonkeyPatch,
    given: list[str],
    message: str,
) -> None:
    mine = tmp_path / "runs"
    shutil.copytree(runs, mine)
    (mine / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text("[]", encoding="utf-8")
    if "begun" in given[-1]:
        unfinished(finished_benchmark(mine, tiny_checkpoint, experiment="begun"))
    if given[-1] == "other":
        finished_benchmark(mine, tiny_checkpoint, experiment="other", first_problem=50)
    record(mine, "5" * 32)
    assert main(["compare", *given, "--runs", str(mine)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert error.startswith("dparallel compare: error: ")
    assert re.search(message, error)


def test_runs_of_other_benchmarks_have_nothing_in_common(
    runs: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "runs"
    shutil.copytree(runs, mine)
    finished_benchmark(mine, tiny_checkpoint, experiment="other", key="proofs-0123456789")
    with pytest.raises(RunError, match=r"no benchmark in common \(sums: sums; other: proofs\)"):
        compare(["sums", "other"], mine)
