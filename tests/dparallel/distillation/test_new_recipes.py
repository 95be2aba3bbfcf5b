"""Every recipe of `configs/recipes` for the coins task trains a few steps on the embedded teacher."""

from pathlib import Path
from typing import Any

import pytest

from dparallel.config.experiment import TrajectoriesConfig
from dparallel.config.problems import ProblemsConfig
from dparallel.stages.manifest import verify
from dparallel.trajectories import store
from dparallel.trajectories.record import run_stage
from tests.dparallel.distillation.conftest import (
    DECODING,
    read_metrics,
    record,
    run_forked,
    shipped,
    write_plan,
)

TEACHER = Path(__file__).parents[3] / "teachers" / "tiny"
# What the recipe's term of its own is at the first step, when student and teacher are the same
RECIPES: dict[str, str] = {
    "near_far": "none",  # the same canvas: no divergence
    "near_far_later": "some",
    "near_far_privileged": "some",
    "own_tokens": "",
    "rollouts": "some",
    "own_order": "",
    "group": "",
    "d2f_tokens": "",
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 responses of the embedded teacher, with prompts for it that end in the answer.

    Its canvas is too short for prompts with whole reference solutions, which `trajectories.privileged` would
    record.
    """
    settings = TrajectoriesConfig(
        problems=ProblemsConfig(benchmark="coins", split="distillation", count=24), decoding=DECODING
    )
    decoded = tmp_path_factory.mktemp("decoded")
    run_stage(settings, {"teacher": str(TEACHER)}, decoded)
    rows = store.load(decoded).to_pylist()
    for row in rows:
        answer = row["response_ids"][row["num_tokens"] - 2]
        row["teacher_prompt_ids"] = [*row["prompt_ids"], answer]
    return record(tmp_path_factory.mktemp("recorded"), TEACHER, rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_it_trains_on_the_embedded_teacher(name: str, recorded: Path, tmp_path: Path) -> None:
    recipe = shipped(name)
    if recipe.rollouts is not None:
        small = recipe.rollouts.model_copy(update={"every": 2, "prompts": 8})
        recipe = recipe.model_copy(update={"rollouts": small})
    settings: dict[str, Any] = {"train_steps": 4, "views_per_step": 8, "checkpoint_every": 10}
    plan, out = write_plan(tmp_path, TEACHER, recorded, recipe=recipe, **settings)
    code, output = run_forked(plan)
    assert code == 0, output
    assert verify(out, "training").counts["train_steps"] == 4
    metrics = read_metrics(out)
    assert all(0 < step["grad_norm"] < 1e4 for step in metrics[1:]), metrics
    assert ("divergence" in metrics[0]) == (recipe.near_far is not None)
    if RECIPES[name]:
        assert (metrics[0]["divergence"] < 1e-6) == (RECIPES[name] == "none")
    assert output.count("the student decoded 8 responses") == (2 if recipe.rollouts else 0)
