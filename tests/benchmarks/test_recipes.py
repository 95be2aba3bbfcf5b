import argparse
import json
from pathlib import Path

import pytest
import yaml

from benchmarks.common.options import Distinct
from benchmarks.common.side_by_side import Speed, bare_loop, contenders, measure_speeds
from benchmarks.recipes import main
from benchmarks.recipes_parts import as_pairs, parts_table
from benchmarks.recipes_report import (
    figure,
    headlines,
    mean_and_spread,
    numbers,
    speed_table,
    table,
    with_aup_2,
)
from dparallel import DecodingConfig, generate, load_model, load_tokenizer
from dparallel.config.base import ConfigError
from dparallel.config.experiment import BenchmarkConfig
from dparallel.config.problems import ProblemsConfig
from dparallel.decoding import compiled
from dparallel.decoding.denoise import denoise
from dparallel.problems.registry import load_problems
from dparallel.reporting.read import read_benchmark
from tests.benchmarks.tables import cells
from tests.dparallel.reporting.made import finished_benchmark
from tests.flows.conftest import small_settings

TEACHERS = Path(__file__).parents[2] / "teachers"
TEACHER, RIVAL = str(TEACHERS / "tiny"), str(TEACHERS / "tiny_autoregressive")


def test_mean_and_spread_by_hand():
    assert mean_and_spread([1.0, 2.0, 3.0], 1) == "2.0 ± 1.0"
    assert mean_and_spread([2.5], 2) == "2.50"
    assert mean_and_spread([], 2) == ""


def metrics(accuracy, threshold):
    return {
        "headline/nfe_ratio": 4.0,
        "teacher/one_token_per_step/accuracy": 0.99,
        "student/x/entropy/accuracy": accuracy,
        "student/x/entropy/nfe": 6.0,
        "student/x/entropy/threshold": threshold,
    }


def test_table_pools_seeds_by_model_and_method():
    runs = [metrics(0.98, 0.5), metrics(1.0, 0.35)]
    titles, teacher, student = cells(table(runs))
    assert titles[:4] == ["model", "method", "threshold", "solution %"]
    assert teacher[:4] == ["teacher", "one_token_per_step", "", "99.0 ± 0.0"]
    assert student[:6] == ["x", "entropy", "0.5, 0.35", "99.0 ± 1.4", "", "6.00 ± 0.00"]
    pooled = numbers(runs)
    assert pooled["student/x/entropy/accuracy"] == pytest.approx(0.99)
    assert pooled["student/x/entropy/accuracy_spread"] == pytest.approx(0.0141, abs=1e-4)
    assert numbers(runs[:1]).keys() == {key for key in pooled if not key.endswith("_spread")}


def of_seed(old, new, other):
    named = {"student/old/entropy": old, "student/new/entropy": 1.0, "student/new/contiguous": new}
    named["student/newer/entropy"] = other
    return {
        f"{name}/{key}": value
        for name, aup in named.items()
        for key, value in [("accuracy", 1), ("aup", aup)]
    }


def test_parts_are_compared_by_seed():
    """Differences 20, 40 and 60: mean 40, standard deviation 20, standard error 20 / sqrt(3) = 11.5."""
    runs = [of_seed(100, 120, 5), of_seed(110, 150, 5), of_seed(90, 150, 5)]
    titles, by_hand, worse = cells(parts_table(runs, [("old", "new"), ("new", "newer")]))
    assert titles[:5] == ["without", "with", "AUP without", "AUP with", "difference"]
    assert titles[5:] == ["difference / its standard error", "AUP with / without"]
    assert by_hand == ["old, entropy", "new, contiguous", "100 ± 10", "140 ± 17", "+40 ± 12", "+3.5", "1.40"]
    assert worse[:2] == ["new, contiguous", "newer, entropy"]
    assert worse[4] == "-135 ± 10"
    [_, same_method] = cells(parts_table(runs, [("new/entropy", "new/contiguous")]))
    assert same_method[:4] == ["new, entropy", "new, contiguous", "1 ± 0", "140 ± 17"]
    [_, alone] = cells(parts_table(runs[:1], [("old", "new")]))
    assert alone == ["old, entropy", "new, contiguous", "100", "120", "+20", "", "1.20"]
    rounded = [of_seed(100.1 * seed, 100.1 * seed + 0.3, 5) for seed in (1, 2, 3)]
    [_, equal] = cells(parts_table(rounded, [("old", "new")]))
    assert equal[4:6] == ["+0 ± 0", ""], "differences that rounding alone makes different"


def test_a_seed_given_twice_counts_once():
    """Else the spread over seeds would be too small."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", action=Distinct)
    assert parser.parse_args(["--seeds", "2", "0", "2", "2"]).seeds == [2, 0]


def test_parts_are_pairs_of_students_with_aup():
    sweep = {"decoding": {"gen_length": 12, "block_length": 6}, "thresholds": [0.5, 1.0]}
    single = {**sweep, "thresholds": [0.5]}
    config = BenchmarkConfig(
        test={"benchmark": "coins", "split": "test", "count": 2},
        validation={"benchmark": "coins", "split": "validation", "count": 2},
        reference={"gen_length": 12, "block_length": 6, "rule": "steps", "steps": 12},
        sweeps={"entropy": sweep, "single": single},
        student_sweeps={"old": ["entropy"], "new": ["entropy", "single"], "one": ["single"]},
    )
    students = ["old", "new", "one"]
    assert as_pairs(["old:new/entropy"], config, students) == [("old", "new/entropy")]
    assert as_pairs(["old:new", "new:old"], config, students) == [("old", "new"), ("new", "old")]
    for part, message in {
        "old:nw": r"no student 'nw'; did you mean 'new'\? give WITHOUT:WITH of old, new, one",
        "old": "give two students or methods, as WITHOUT:WITH; students are old, new, one",
        ":old": "no student ''",
        "old/:new": "old/ names no method; give one, or drop the slash",
        "old:old": "give two students",
        "old:new/confidence": "new has no sweep 'confidence' of several thresholds; it has entropy",
        "old:new/single": "new has no sweep 'single' of several thresholds; it has entropy",
        "old:one": "one has no sweep of several thresholds, and so no AUP; give it one in student_sweeps",
    }.items():
        with pytest.raises(ConfigError, match=f"--parts {part}: {message}"):
            as_pairs([part], config, students)


def row(model, method, accuracy, tpf, threshold=None, split="test", **more):
    decoding = {"gen_length": 36, "block_length": 12}
    return {
        **{"model": model, "method": method, "accuracy": accuracy, "tpf": tpf, "threshold": threshold},
        **{"split": split, "operating_point": False, "decoding": decoding, **more},
    }


STEPS = {"gen_length": 36, "block_length": 12, "rule": "steps", "steps": 36}
ROWS = [
    row("teacher", "entropy", 0.97, 2.0, 0.5, split="validation"),
    row("teacher", "one_token_per_step", 1.0, 1.0, decoding=STEPS),
    row("teacher", "few_step", 0.1, 4.0),
    row("teacher", "entropy", 0.98, 2.0, 0.5, operating_point=True),
    row("student/x", "entropy", 0.9, 5.0, 0.7),
    row("student/x", "entropy", 0.98, 4.0, 0.5, operating_point=True),
    row("baseline/rival", "sequential", 0.95, 1.0),
]
RESULTS = {
    "rows": ROWS,
    "aup": [{"model": "student/x", "method": "entropy", "split": "test", "aup": 390.0}],
    "default_student": "student/x",
    "headline": {"accuracy_loss": 0.02, "nfe_ratio": 4.0, "tpf_ratio_to_teacher_best": 2.0},
}


def test_the_picture_has_a_line_for_each_swept_method_and_a_mark_for_the_others():
    second = {**RESULTS, "rows": [{**each, "accuracy": each["accuracy"] - 0.02} for each in ROWS]}
    drawn = figure([RESULTS, second])
    [axes] = drawn.axes
    by_label = {each.get_label(): each for each in axes.containers}
    assert set(by_label) == {
        "teacher, one token per step",
        "teacher, few step",
        "teacher, entropy",
        "x, entropy",
        "rival, sequential",
    }
    line = by_label["x, entropy"].lines[0]
    assert list(line.get_xdata()) == [4.0, 5.0]
    assert list(line.get_ydata()) == pytest.approx([97.0, 89.0])
    assert line.get_linestyle() == "-"
    assert by_label["rival, sequential"].lines[0].get_linestyle() == "None"


def test_headlines_of_each_seed():
    assert cells(headlines([7], [RESULTS]))[1] == ["7", "x", "-2.0", "4.00", "2.00"]


def test_a_seed_without_a_default_student_says_so():
    none = {"default_student": None, "headline": {"accuracy_loss": 0.98, "keeps_accuracy": 0.0}}
    assert cells(headlines([7], [none]))[1] == ["7", "no student keeps the accuracy", "-98.0", "", ""]


@pytest.mark.slow
def test_the_command_runs_every_seed_and_writes_a_comparison(tmp_path, tiny_checkpoint, monkeypatch, capsys):
    """A whole experiment, and its models side by side."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    config = small_settings(tiny_checkpoint, tmp_path / "runs")
    del config["students"]["no_certainty"]
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = ["recipes", "--config", "small.yaml", "--seeds", "0", "--problems", "2", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", [*command, "--batch-sizes", "2"])
    main()
    home = tmp_path / "runs" / "small"
    compared = json.loads((home / "comparison.json").read_text(encoding="utf-8"))
    assert list(compared["seeds"]) == ["0"]
    assert (home / "comparison.png").is_file()
    text = (home / "comparison.md").read_text(encoding="utf-8")
    assert text.strip() in capsys.readouterr().out
    assert "24 test problems, batch 24" in text
    assert compared["pooled"]["teacher/one_token_per_step/aup_2"] >= 0
    assert [line[0] for line in cells(text)].count("0") == 1


def test_reference_operating_points_and_baselines_race():
    assert [(each.model, each.method) for each in contenders(ROWS)] == [
        ("teacher", "one_token_per_step"),
        ("teacher", "entropy"),
        ("student/x", "entropy"),
        ("baseline/rival", "sequential"),
    ]


AUTOREGRESSIVE = {"mode": "autoregressive", "gen_length": 36}


def test_models_are_timed_side_by_side(monkeypatch):
    """Real models, and a clock that ticks per forward pass and row, so that rates are tokens per tick.

    Ratios compare with the autoregressive bare loop at the same batch size.
    """

    def ticking(run, device):
        generations = run()
        return generations, float(sum(each.nfe for each in generations))

    monkeypatch.setattr("benchmarks.common.side_by_side.timed", ticking)
    rows = [*ROWS[:-1], row("baseline/rival", "baseline", 0.95, 1.0, decoding=AUTOREGRESSIVE)]
    inputs = dict.fromkeys(("teacher", "student/x"), TEACHER) | {"baseline/rival": RIVAL}
    problems = ProblemsConfig(benchmark="coins", split="validation", count=10)
    speeds = measure_speeds(contenders(rows), inputs, problems, [1, 2], problems=2, rounds=2)
    assert [(each.model, each.method, each.batch_size) for each in speeds] == [
        (model, method, size)
        for model, method in (
            ("teacher", "one_token_per_step"),
            ("teacher", "entropy"),
            ("student/x", "entropy"),
            ("baseline/rival", "baseline"),
            ("baseline/rival", "bare loop"),
        )
        for size in (1, 2)
    ]
    assert [each.ratio for each in speeds[-2:]] == [1.0, 1.0]
    assert speeds[0].nfe == 36
    assert speeds[-1].nfe == speeds[-3].nfe == 30
    assert [each.tokens_per_second for each in speeds[-4:]] == [1.0] * 4
    one_by_one, entropy = speeds[0], speeds[2]
    assert one_by_one.tokens_per_second == pytest.approx(30 / 36)  # stops at no end-of-text
    assert all(each.ratio == each.tokens_per_second for each in speeds)
    assert entropy.ratio > 2 * one_by_one.ratio


def test_compiled_steps_are_timed_beside_the_others(monkeypatch):
    monkeypatch.setattr(compiled, "compiled_denoise", lambda device: denoise)  # compilation takes minutes
    rows = [ROWS[1], row("baseline/rival", "baseline", 0.95, 1.0, decoding=AUTOREGRESSIVE)]
    inputs = {"teacher": TEACHER, "baseline/rival": RIVAL}
    problems = ProblemsConfig(benchmark="coins", split="validation", count=2)
    speeds = measure_speeds(contenders(rows), inputs, problems, [1], problems=2, rounds=1, compile=True)
    assert [(each.method, each.nfe) for each in speeds] == [
        ("one_token_per_step", 36),
        ("one_token_per_step, compiled", 36),
        ("baseline", 30),
        ("bare loop", 30),
        ("baseline, compiled", 30),
    ]


@pytest.mark.parametrize("ends", [("<eos>",), ("<eos>", "answer")])
def test_the_bare_loop_gives_the_same_tokens(ends):
    model, tokenizer = load_model(RIVAL), load_tokenizer(RIVAL)
    model.config.end_token_ids = tuple(tokenizer.convert_tokens_to_ids(list(ends)))
    problems = load_problems(ProblemsConfig(benchmark="coins", split="validation", count=5))
    prompts = tokenizer([problem.prompt for problem in problems]).input_ids
    prompts[3] = prompts[3][:-2]  # an invalid problem, of another length
    decoding = DecodingConfig(**AUTOREGRESSIVE)
    for ours, bare in zip(
        generate(model, prompts, decoding), bare_loop(model, prompts, decoding, 2), strict=True
    ):
        assert (bare.tokens, bare.nfe, bare.num_tokens) == (ours.tokens, ours.nfe, ours.num_tokens)


def test_speeds_by_hand():
    speeds = [
        Speed("student/x", "entropy", 1, 200.0, 2.0, 3.0, 0.9),
        Speed("student/x", "entropy", 16, 900.0, 1.5, 3.0, 0.9),
        Speed("baseline/rival", "bare loop", 1, 100.0, 1.0, 30.0, 1.0),
        Speed("baseline/rival", "bare loop", 16, 600.0, 1.0, 30.0, 1.0),
    ]
    rates = ["tokens/s, batch 1", "tokens/s, batch 16"]
    ratios = ["times the bare loop, batch 1", "times the bare loop, batch 16"]
    assert cells(speed_table(speeds)) == [
        ["model", "method", "solution %", "NFE", *rates, *ratios],
        ["x", "entropy", "90.0", "3.0", "200", "900", "2.00", "1.50"],
        ["rival", "bare loop", "100.0", "30.0", "100", "600", "1.00", "1.00"],
    ]


def test_rows_have_an_aup_of_two_points(tiny_checkpoint, tmp_path):
    """Two seeds by hand: of 4 of 5 at TPF 10/12, then 3 of 5 and 5 of 5 at 10/3; 5 of 5 weighs fully."""
    folders = [
        finished_benchmark(tmp_path / name, tiny_checkpoint, student=name) for name in ("11100", "11111")
    ]
    found = [read_benchmark("sums", folder, run=folder.parent.parent.name) for folder in folders]
    runs = with_aup_2([{"student/fast/entropy/accuracy": 0.6}, {"student/fast/entropy/accuracy": 1.0}], found)
    assert [run["student/fast/entropy/aup_2"] for run in runs] == [
        pytest.approx(80 * 10 / 12),  # 60 % is more than 5 points below the first point
        pytest.approx(66.66667 + 1.25 * 143.90493),
    ]
    assert runs[0]["teacher/one_token_per_step/aup_2"] == pytest.approx(80 * 10 / 12)
    titles, student = cells(table(runs))
    assert student[titles.index("AUP_2")] == "157 ± 127"
