"""What `dparallel clean` removes, and what `dparallel runs` lists, on folders that stages have written."""

import io
import json
import re
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dparallel.cli.main import main
from dparallel.config.experiment import MEASUREMENTS
from dparallel.reporting.cleaning import removals, remove, results_to_give_up
from dparallel.reporting.past import PastStage, made_from, past_experiments
from dparallel.stages.lease import held
from dparallel.stages.manifest import CLAIM, MANIFEST
from tests.dparallel.reporting.made import finished_benchmark
from tests.dparallel.reporting.made_runs import clean, made, run_of, stages_in


def test_nothing_of_a_finished_run_goes(tmp_path: Path) -> None:
    whole = run_of(tmp_path / "sums", 1, 0)
    assert removals(tmp_path, past_experiments(tmp_path), {}) == ([], [])
    assert stages_in(tmp_path) == set(whole)


def test_a_given_up_result_goes_with_all_that_only_it_was_made_from(tmp_path: Path) -> None:
    old = run_of(tmp_path / "sums", 1, 0)
    new = run_of(tmp_path / "sums", 2, 10, trajectories=old[0])
    assert results_to_give_up(past_experiments(tmp_path), keep=1) == {old[3]}
    clean(tmp_path, {old[3]})
    assert stages_in(tmp_path) == set(new), "the recording is of both"
    store = tmp_path / MEASUREMENTS / "samples"
    assert (store / "shared/0.parquet").is_file()
    assert (store / "2/0.parquet").is_file()
    assert not (store / "1/0.parquet").exists()


def test_what_another_experiment_is_made_from_stays(tmp_path: Path) -> None:
    old = run_of(tmp_path / "sums", 1, 0)
    other = made(tmp_path / "other", "benchmark-sums", 7, {"student/fast": old[2]}, 20)
    clean(tmp_path, set(old))
    assert stages_in(tmp_path) == {*old[:3], other}


def test_what_a_later_result_superseded_goes_and_what_no_result_came_after_stays(tmp_path: Path) -> None:
    early, early_made = [made(tmp_path / "sums", "training-slow", number) for number in (8, 9)]
    whole = run_of(tmp_path / "sums", 1, 5)
    late = made(tmp_path / "sums", "training-slow", 10, hour=30)
    unfinished = made(tmp_path / "sums", "trajectories", 11, hour=None)  # its files are of today
    alone = made(tmp_path / "unmeasured", "trajectories", 12)
    clean(tmp_path)
    assert stages_in(tmp_path) == {*whole, late, unfinished, alone}
    assert not early.exists()
    assert not early_made.exists()


def test_a_teacher_beside_the_experiments_stays_unless_it_is_named(tmp_path: Path) -> None:
    teacher = made(tmp_path, "teacher", 1)
    run_of(tmp_path / "sums", 1, 10)
    clean(tmp_path)
    assert teacher.is_dir()
    clean(tmp_path, {teacher})
    assert not teacher.exists()


def test_what_is_in_use_stays_with_all_that_it_is_made_from(tmp_path: Path) -> None:
    whole = run_of(tmp_path / "sums", 1, 0)
    with held(whole[2]):
        [note] = clean(tmp_path, set(whole))
        assert stages_in(tmp_path) == set(whole[:3])
        assert str(whole[2]) in note
    clean(tmp_path, set(whole))
    assert not (tmp_path / "sums").exists()


def test_a_stage_that_comes_into_use_after_the_question_stays(tmp_path: Path, monkeypatch, capsys) -> None:
    whole = run_of(tmp_path / "sums", 1, 0)
    with ExitStack() as stack:

        def agree() -> bool:
            stack.enter_context(held(whole[0]))
            return True

        monkeypatch.setattr("dparallel.cli.clean._agreed", agree)
        assert main(["clean", "sums", "--runs", str(tmp_path)]) == 0
    assert stages_in(tmp_path) == {whole[0]}
    assert "Kept: " in capsys.readouterr().err


def test_measurements_stay_while_an_unfinished_benchmark_may_use_them(tmp_path: Path) -> None:
    whole = run_of(tmp_path / "sums", 1, 0)
    made(tmp_path / "other", "benchmark-sums", 5, hour=None)
    [note] = clean(tmp_path, set(whole))
    assert "2 files of measurements are kept" in note
    assert (tmp_path / MEASUREMENTS / "samples/1/0.parquet").is_file()


def test_reports_plans_and_records_go_with_their_stages(tmp_path: Path) -> None:
    whole = run_of(tmp_path / "sums", 1, 0)
    home = tmp_path / "sums"
    for name, stage in (("report-1", whole[3].name), ("report-2", "benchmark-of-another")):
        (home / name).mkdir()
        report = {"benchmarks": [{"benchmark": "sums", "runs": [{"stage": stage}]}]}
        (home / name / "report.json").write_text(json.dumps(report), encoding="utf-8")
    (home / f"{whole[1].name}.plan.json").touch()
    (home / "notes.txt").touch()
    for record in ("a", "b"):
        (home / "tracking").mkdir(exist_ok=True)
        content = json.dumps({"uploaded": "sqlite:///mlflow.db" if record == "a" else None})
        (home / "tracking" / f"{record}.json").write_text(content, encoding="utf-8")
    clean(tmp_path, set(whole))
    left = {path.name for path in home.iterdir()}
    assert left == {"report-2", "notes.txt", "tracking"}, "a record that MLflow lacks stays"


def test_plans_are_listed_with_their_own_experiment(tmp_path: Path) -> None:
    whole = run_of(tmp_path / "sums", 1, 0)
    run_of(tmp_path / "tests", 2, 0)
    (tmp_path / "sums" / f"{whole[1].name}.plan.json").touch()
    given_up = dict.fromkeys(whole, "it is given up")
    found, _ = removals(tmp_path, past_experiments(tmp_path), given_up)
    beside = [removal.folder for removal in found if removal.why == "they belong to what is removed"]
    assert beside == [tmp_path / "sums"]


def test_what_killed_runs_left_goes_and_what_is_being_written_stays(tmp_path: Path) -> None:
    stage = run_of(tmp_path / "sums", 1, 0)[2]
    (stage / ".saving-abc").mkdir()
    (stage / ".saving-abc" / "model.safetensors").touch()
    (stage / ".result.0123.partial").touch()
    (tmp_path / "sums" / ".removing-training-fast-0123456789").mkdir()
    clean(tmp_path)
    assert {path.name for path in stage.iterdir()} == {"result", "stage.json", MANIFEST}
    assert not list((tmp_path / "sums").glob(".removing-*"))


def test_checkpoints_of_finished_trainings_only_when_asked_for(tmp_path: Path) -> None:
    trained = run_of(tmp_path / "sums", 1, 0)[1]
    stopped = made(tmp_path / "sums", "training-slow", 2, hour=None)
    for stage in (trained, stopped):
        (stage / "checkpoints" / "step-5").mkdir(parents=True)
    clean(tmp_path)
    assert (trained / "checkpoints").is_dir()
    clean(tmp_path, checkpoints=True)
    assert not (trained / "checkpoints").exists()
    assert (stopped / "checkpoints").is_dir(), "an unfinished training goes on from them"


def test_links_are_removed_and_not_what_they_lead_to(tmp_path: Path) -> None:
    runs, elsewhere = tmp_path / "runs", tmp_path / "elsewhere"
    whole = run_of(runs / "sums", 1, 0)
    elsewhere.mkdir()
    shutil.move(whole[0], elsewhere / "recorded")
    whole[0].symlink_to(elsewhere / "recorded")
    (whole[1] / "more").symlink_to(elsewhere)
    clean(runs, set(whole))
    assert not (runs / "sums").exists()
    assert (elsewhere / "recorded" / "result").is_file()


def test_a_linked_experiment_has_its_size_and_goes_whole(tmp_path: Path, capsys) -> None:
    home = run_of(tmp_path / "r" / "sums", 1, 0)[0].parent
    (tmp_path / "r2").mkdir()
    (tmp_path / "r2" / "sums").symlink_to(Path("..", "r", "sums"))
    assert main(["runs", "--runs", str(tmp_path / "r2"), "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["bytes"] == sum(file.stat().st_size for file in home.rglob("*") if file.is_file())
    assert main(["clean", "sums", "--runs", str(tmp_path / "r2"), "--yes"]) == 0
    assert "Removed " in capsys.readouterr().out
    assert list((tmp_path / "r2").iterdir()) == []
    assert list(home.iterdir()) == []


def test_a_link_to_an_experiment_beside_it_is_no_further_one(tmp_path: Path, capsys) -> None:
    made(tmp_path / "sums", "training-slow", 9)  # superseded
    whole = run_of(tmp_path / "sums", 1, 5)
    for name in ("latest", "zero"):
        (tmp_path / name).symlink_to("sums")
    assert main(["clean", "--runs", str(tmp_path), "--yes"]) == 0
    assert stages_in(tmp_path) == set(whole)
    assert main(["clean", "latest", "--runs", str(tmp_path), "--yes"]) == 0
    assert not (tmp_path / "sums").exists()
    assert capsys.readouterr().err == ""


def test_a_linked_stage_leaves_no_lease_where_it_led_to(tmp_path: Path) -> None:
    stage = made(tmp_path / "runs" / "sums", "trajectories", 1)
    shutil.move(stage, tmp_path / "elsewhere")
    stage.symlink_to(tmp_path / "elsewhere")
    clean(tmp_path / "runs", {stage})
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"result", CLAIM, MANIFEST}


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_no_kept_result_loses_anything_it_was_made_from(tmp_path_factory, data: st.DataObject) -> None:
    """Whatever is given up, at whatever times it was made, and wherever the removal is interrupted."""
    runs = tmp_path_factory.mktemp("runs")
    for number in range(data.draw(st.integers(1, 3))):
        experiment = runs / data.draw(st.sampled_from(["a", "b"]))
        recorded = sorted(experiment.glob("trajectories-*"))
        shared = data.draw(st.sampled_from([None, *recorded]))
        run_of(experiment, number, data.draw(st.integers(0, 20)), shared)
    before = {stage.folder: stage for experiment in past_experiments(runs) for stage in experiment.stages}
    given_up = {folder for folder in sorted(before) if data.draw(st.booleans(), label=folder.name)}
    found, _ = removals(runs, past_experiments(runs), dict.fromkeys(given_up, "named"))
    for removal in found[: data.draw(st.integers(0, len(found)))]:
        remove(removal)
    there = stages_in(runs)
    results = [stage for stage in before.values() if stage.is_benchmark and stage.folder not in given_up]
    assert made_from(results, before.values()) <= there
    for stage in results:
        assert stage.manifest is not None
        assert all((runs / MEASUREMENTS / name).is_file() for name in stage.manifest.details["measurements"])
    clean(runs, given_up & there)
    assert stages_in(runs) == stages_needed(results, before.values())


def stages_needed(results: list[PastStage], stages: object) -> set[Path]:
    """By a search from each stage: whether a kept result can be reached from it."""
    users: dict[Path, set[Path]] = {}
    everything = {stage.folder: stage for stage in stages}  # type: ignore[attr-defined]
    for one in everything.values():
        users[one.folder] = {other.folder for other in everything.values() if one.fingerprint in other.inputs}
    goals = {stage.folder for stage in results}

    def leads(folder: Path) -> bool:
        return folder in goals or any(map(leads, users[folder]))

    return {folder for folder in everything if leads(folder)}


def test_the_command_asks_first(tmp_path: Path, monkeypatch, capsys) -> None:
    whole = run_of(tmp_path / "sums", 1, 0)
    command = ["clean", str(tmp_path / "sums"), "--runs", str(tmp_path)]
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n"))  # no terminal: nothing is asked
    assert main(command) == 0
    assert "give --yes" in capsys.readouterr().out
    assert stages_in(tmp_path) == set(whole)
    for answer, left in (("n\n", set(whole)), ("\n", set(whole)), ("", set(whole)), ("y\n", set[Path]())):
        terminal = io.StringIO(answer)
        terminal.isatty = lambda: True  # type: ignore[method-assign]
        monkeypatch.setattr("sys.stdin", terminal)
        assert main(command) == 0
        assert "Remove it? [y/N]" in capsys.readouterr().out
        assert stages_in(tmp_path) == left
    assert main(["clean", "--runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "Nothing to remove.\n"


def test_the_table_says_what_goes_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = run_of(tmp_path / "sums", 1, 0)
    run_of(tmp_path / "sums", 2, 10, trajectories=old[0])
    (old[0] / ".saving-abc").mkdir()
    (old[0] / ".result.0123.partial").touch()
    config = tmp_path / "sums" / "configs" / "0.yaml"
    config.parent.mkdir()
    config.write_text("name: sums\nstore: s3://bucket/results\n", encoding="utf-8")
    assert main(["clean", "--runs", str(tmp_path), "--keep", "1"]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"{old[3].name} .* older than --keep 1\n", text)
    assert f"{old[0].name}: 1 file and 1 folder in it" in text
    assert "sums: s3://bucket/results keeps its copies" in text
    assert "\nKept: sums (4 stages); samples of `dparallel eval`, files elsewhere" in text
    assert main(["clean", "sums", "--runs", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"{old[3].name} .* named: sums\n", text)
    assert "\nKept: no stage; samples of `dparallel eval`, files elsewhere" in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            ["clean", "--runs", "s3://bucket/runs"],
            "s3://bucket/runs is a URL: give the folder of runs of this",
        ),
        (["clean", "absent"], "absent is no experiment, report or stage in"),
        (["clean", "smus", "--runs", "."], "in .: did you mean 'sums'? `dparallel runs` lists"),
        (["clean", "--keep", "0"], "'0': give a whole number of at least 1"),
        (["clean", "--runs", "nowhere"], "nowhere: no such folder"),
        (["runs", "--runs", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_bad_input(arguments, named, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    made(tmp_path / "sums", "trajectories", 1)
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    assert named in capsys.readouterr().err


def test_runs_lists_headlines_states_and_sizes(tmp_path: Path, tiny_checkpoint: Path, capsys) -> None:
    stage = finished_benchmark(tmp_path, tiny_checkpoint, student="11111")
    useless = finished_benchmark(tmp_path, tiny_checkpoint, experiment="useless", student="00000")
    results = json.loads((useless / "results.json").read_text(encoding="utf-8"))
    (useless / "results.json").write_text(json.dumps({**results, "default_student": None}), encoding="utf-8")
    made(tmp_path / "begun", "trajectories", 1, hour=None)
    made(tmp_path / "recorded", "trajectories", 2, hour=5)
    with held(made(tmp_path / "busy", "training-fast", 3, hour=None)):
        assert main(["runs", "--runs", str(tmp_path), "--json"]) == 0
        rows = {row["experiment"]: row for row in json.loads(capsys.readouterr().out)}
        assert main(["runs", "--runs", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    states = {name: row["state"] for name, row in rows.items()}
    assert states["begun"] == "unfinished: trajectories"
    assert states["recorded"] == "trajectories finished 2026-11-01"
    assert states["busy"] == "running: training fast"
    assert states["sums"].startswith("finished 20")
    best = rows["sums"]
    assert (best["default_student"], best["nfe"], best["nfe_speed_up"]) == ("student/fast", 3.0, 4.0)
    assert (best["accuracy"], best["problems"], best["reference_accuracy"]) == (1.0, 5, 0.8)
    assert best["bytes"] == sum(file.stat().st_size for file in stage.parent.rglob("*") if file.is_file())
    assert rows["useless"]["default_student"] is None
    line = next(line for line in table.splitlines() if line.startswith("sums"))
    assert line.split()[-7:-2] == ["100.0]", "5", "3.0", "4.00x", "3.33"]
    assert "fast, entropy *" in table
    assert "no student keeps the accuracy" in table


def test_numbers_of_an_earlier_result_are_said_to_be(tmp_path: Path, tiny_checkpoint: Path, capsys) -> None:
    finished_benchmark(tmp_path, tiny_checkpoint, student="11111")
    made(tmp_path / "sums", "training-fast", 1, hour=0)  # long before
    assert main(["runs", "--runs", str(tmp_path)]) == 0
    assert "earlier result" not in capsys.readouterr().out
    made(tmp_path / "sums", "training-fast", 2, hour=24 * 365 * 20)
    assert main(["runs", "--runs", str(tmp_path)]) == 0
    expected = "sums: the numbers are of an earlier result; training fast came later, with other settings."
    assert expected in capsys.readouterr().out
