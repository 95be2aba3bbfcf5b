"""Commit rules of an experiment are checked before anything starts."""

from pathlib import Path

import pytest

from dparallel.config.base import ConfigError
from dparallel.models.formats import CheckpointError
from tasks.checks import checked_experiment
from tests.conftest import ROOT

CONFIGS = ROOT / "configs"


def test_a_commit_rule_that_no_model_has_is_refused(tmp_path: Path) -> None:
    """Before anything starts: the students' is fitted by their merging, and others lie beside the models."""
    tiny, runs = str(CONFIGS / "tiny.yaml"), f"runs={tmp_path}"
    learned = "{gen_length: 36, block_length: 12, rule: learned, threshold: 0.9}"
    sweep = f"benchmarks.coins.sweeps.entropy.decoding={learned}"
    own = [runs, sweep, "benchmarks.coins.teacher_sweeps=[confidence]"]
    with pytest.raises(ConfigError, match=r"sweeps\.entropy\.rule=learned without merging\.commit_rule"):
        checked_experiment(tiny, own, stages=[])
    checked_experiment(tiny, [*own, "merging.commit_rule={}"], stages=[])
    with pytest.raises(
        CheckpointError, match=r"in benchmarks\.coins\.sweeps\.entropy\) whose checkpoint holds no"
    ):
        checked_experiment(tiny, [runs, sweep, "merging.commit_rule={}"], stages=[])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["merging.commit_rule={block_length: 7}"],
            "block_length=7 does not divide .* of 36 tokens",
        ),
        (
            ["merging.commit_rule={}", "trajectories.problems.count=5"],
            "merging.commit_rule with 5 problems to record: give at least 10",
        ),
        (
            [
                "merging.commit_rule={}",
                "trajectories.decoding={mode: revising, gen_length: 36, block_length: 12, threshold: 0.8}",
            ],
            "trajectories with mode='revising', .* record them with another mode",
        ),
        (
            [
                "merging.commit_rule={block_length: 36}",
                f"students={{causal: {CONFIGS / 'recipes' / 'd2f.yaml'}}}",
                "benchmarks.coins.sweeps={p: {decoding: {mode: pipelined, gen_length: 36, block_length: 12, "
                "rule: entropy, threshold: 0.5}, thresholds: [0.5]}}",
                "benchmarks.coins.teacher_sweeps=[]",
                "benchmarks.coins.student_sweeps=[p]",
            ],
            r"students\.causal: block_length=36 for a block-causal student .* in blocks of 12: leave it out",
        ),
    ],
)
def test_a_commit_rule_that_cannot_be_fitted_is_refused(
    tmp_path: Path, settings: list[str], message: str
) -> None:
    """Its fitting comes after recording and training."""
    with pytest.raises(ConfigError, match=message):
        checked_experiment(str(CONFIGS / "tiny.yaml"), [f"runs={tmp_path}", *settings])


def test_sweeps_of_students_that_the_experiment_does_not_have_ask_for_nothing(tmp_path: Path) -> None:
    """A benchmark's file lists sweeps for twelve students; this experiment has one of them."""
    learned = "{gen_length: 36, block_length: 12, rule: learned, threshold: 0.9}"
    settings = [
        f"runs={tmp_path}",
        f"students={{consistency: {CONFIGS / 'recipes' / 'consistency.yaml'}}}",
        f"benchmarks.coins.sweeps.revising.decoding={learned}",
        "benchmarks.coins.student_sweeps.own_tokens=[revising]",
    ]
    experiment = checked_experiment(str(CONFIGS / "tiny_recipes.yaml"), settings, stages=[])
    assert [*experiment.config.students] == ["consistency"]
    with pytest.raises(ConfigError, match=r"sweeps\.revising\.rule=learned without merging\.commit_rule"):
        checked_experiment(
            str(CONFIGS / "tiny_recipes.yaml"),
            [*settings, "benchmarks.coins.student_sweeps.consistency=[revising]"],
            stages=[],
        )
