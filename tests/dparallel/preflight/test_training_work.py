"""Forward passes of trainings, by hand from the tiny config: 150 steps of 64 views."""

from pathlib import Path

import pytest

from dparallel.config.experiment import DistillConfig
from dparallel.config.files import load_config
from dparallel.preflight.progress import Progress
from dparallel.preflight.prompts import PromptLengths
from dparallel.preflight.work import forwards_by_stage

CONFIG = Path(__file__).parents[3] / "configs" / "tiny.yaml"
VIEWS = 150 * 64
OTHERS = 2 * 2 * VIEWS  # of the other two students: a forward pass, and a backward pass that counts as one


@pytest.mark.parametrize(
    ("recipe", "most", "rows"),
    [
        ("consistency", True, 2 * VIEWS),
        ("near_far", True, 3 * VIEWS),  # and one of the teacher
        ("near_far_later", True, 3 * VIEWS),
        ("group", True, 2 * VIEWS),
        ("d2f_tokens", True, 2 * VIEWS),  # d2f has one of the teacher
        ("own_tokens", True, 2.5 * VIEWS),  # half of the views are predicted first
        ("rollouts", True, 3 * VIEWS + 3 * 256 * 36),  # three times 256 responses, at most 36 passes each
        ("rollouts", False, 3 * VIEWS + 3 * 256 * 3),  # and at least one for each block
    ],
)
def test_forward_passes_of_a_training(recipe: str, most: bool, rows: float) -> None:
    config = load_config(DistillConfig, CONFIG, [f"students.consistency=recipes/{recipe}.yaml"])
    needed = forwards_by_stage(config, PromptLengths([12] * 1500), 48, Progress(), most)["training"]
    assert needed.rows == OTHERS + rows
    assert needed.tokens == 48 * needed.rows


@pytest.mark.parametrize("name", ["tiny_recipes", "ledger_recipes"])
def test_the_recipes_that_are_compared_fit_their_task(name: str) -> None:
    config = load_config(DistillConfig, CONFIG.parent / f"{name}.yaml")
    gen_length = config.trajectories.decoding.gen_length
    for student, recipe in config.recipes.items():
        assert recipe.misfit(gen_length) is None, student
        assert recipe.rollouts is None or recipe.rollouts.misfit(gen_length) is None
        for benchmark in config.benchmarks.values():
            modes = {benchmark.sweeps[sweep].decoding.mode for sweep in benchmark.sweeps_of(student)}
            assert ("pipelined" in modes) == (recipe.attention == "block_causal")


def test_forward_passes_of_fitted_commit_rules() -> None:
    """Of two students that are not merged yet: 10 canvases of each of 50 trajectories, of 48 tokens."""
    fitted = "merging.commit_rule={trajectories: 50, canvases: 10}"
    config = load_config(DistillConfig, CONFIG, [fitted])
    lengths = PromptLengths([12] * 1500)
    needed = forwards_by_stage(config, lengths, 48, Progress(merged=1))["commit rules"]
    assert (needed.rows, needed.tokens) == (2 * 50 * 10, 2 * 50 * 10 * 48)
    few = forwards_by_stage(config, PromptLengths([12] * 20), 48, Progress())["commit rules"]
    assert few.rows == 3 * 20 * 10
    assert "commit rules" not in forwards_by_stage(
        load_config(DistillConfig, CONFIG), lengths, 48, Progress()
    )
