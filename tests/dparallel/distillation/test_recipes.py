import json
from pathlib import Path

import pytest
import torch

from dparallel.config.files import load_config
from dparallel.config.recipe import RecipeConfig
from dparallel.config.recipe_parts import Group, NearFar
from dparallel.distillation.engine import deepspeed_config
from tests.dparallel.distillation.conftest import CONFIGS, shipped, training_config


def test_the_ablation_differs_in_one_setting() -> None:
    certainty_forcing, consistency = shipped("certainty_forcing"), shipped("consistency")
    assert (certainty_forcing.certainty_weight, certainty_forcing.certainty_temperature) == (2.0, 0.5)
    assert certainty_forcing.eos_region_ratio == 1.0  # published: blocks are drawn uniformly
    assert consistency == certainty_forcing.model_copy(update={"certainty_weight": 0.0})


def test_trajectory_ordered_has_one_view() -> None:
    assert shipped("trajectory_ordered").masking == "trajectory"
    assert shipped("trajectory_ordered").views == 1
    assert shipped("trajectory_ordered").eos_region_ratio == 0.1


@pytest.mark.parametrize(("name", "block_length"), [("d2f", 12), ("d2f_llada", 16)])
def test_d2f_is_as_published_but_for_the_embedded_tasks_block(name: str, block_length: int) -> None:
    recipe = shipped(name)
    assert recipe == shipped("d2f").model_copy(update={"block_length": block_length})
    assert (recipe.mask_ratio, recipe.views, recipe.eos_region_ratio) == ((0.2, 0.7), 1, 0.0)
    assert (recipe.targets, recipe.weighting, recipe.certainty_weight) == ("teacher", "inverse_ratio", 0.0)


@pytest.mark.parametrize(
    ("name", "gen_length", "grows"), [("d3llm", 36, [6, 9, 12]), ("d3llm_llada", 256, [16, 32])]
)
def test_d3llm_grows_and_masks_more(name: str, gen_length: int, grows: list[int]) -> None:
    recipe = shipped(name)
    points = [recipe.at(step / 100, gen_length) for step in range(101)]
    assert list(dict.fromkeys(point.block_length for point in points)) == grows
    assert [points[step].mask_ratio for step in (0, 50, 100)] == [(0.0, 0.8), (0.4, 0.8), (0.8, 0.8)]
    # (CE + CE of the complement + 2 entropy) / 4
    assert (recipe.cross_entropy_weight, recipe.certainty_weight) == (1 / 4, 2 / 4)
    assert (recipe.complement, recipe.certainty_on_complement) == (True, False)


def test_near_far_is_as_published() -> None:
    """TAD: the whole response at any step, delta 8, both terms with weight 1, nothing else."""
    recipe = shipped("near_far")
    assert recipe.near_far == NearFar(delta=8, far_canvas="same", far_weight=1.0)
    assert (recipe.region, recipe.mask_ratio, recipe.views, recipe.attention) == ("response", None, 1, "full")
    assert (recipe.cross_entropy_weight, recipe.certainty_weight) == (1.0, 0.0)
    later = recipe.near_far.model_copy(update={"far_canvas": "later"})
    assert shipped("near_far_later") == recipe.model_copy(update={"near_far": later})
    switches = {"teacher_prompt": "privileged", "only_correct": True}
    assert shipped("near_far_privileged") == recipe.model_copy(update=switches)


def test_own_tokens_are_as_published() -> None:
    """OPUT: three quarters of the response masked, half of the views filled, the mean over all tokens."""
    recipe = shipped("own_tokens")
    assert (recipe.region, recipe.masking, recipe.mask_ratio) == ("response", "random", 0.75)
    assert (recipe.own_tokens, recipe.views, recipe.certainty_weight) == (0.5, 1, 0.0)


@pytest.mark.parametrize(("name", "block_length", "blocks"), [("group", 12, 3), ("group_llada", 32, 4)])
def test_groups_have_the_published_ratios(name: str, block_length: int, blocks: int) -> None:
    recipe = shipped(name)
    assert recipe.group == Group(blocks=blocks, low=(0.001, 0.3), high=(0.5, 1.0))
    assert (recipe.block_length, recipe.targets, recipe.weighting) == (
        block_length,
        "trajectory",
        "view_mean",
    )


@pytest.mark.parametrize("ending", ["", "_llada"])
def test_d2f_with_tokens_differs_in_its_targets(ending: str) -> None:
    recipe = shipped(f"d2f{ending}")
    assert shipped(f"d2f_tokens{ending}") == recipe.model_copy(update={"targets": "trajectory"})


@pytest.mark.parametrize(("name", "gen_length"), [("", 36), ("_ledger", 60), ("_llada", 256)])
def test_rollouts_differ_in_their_lengths(name: str, gen_length: int) -> None:
    recipe = shipped(f"rollouts{name}")
    assert recipe.rollouts.misfit(gen_length) is None
    assert (recipe.rollouts.every, recipe.rollouts.prompts) == (50, 256)
    assert (recipe.near_far.far_canvas, recipe.cross_entropy_weight) == ("later", 0.0)
    assert not recipe.needs_steps  # of the recorded responses


@pytest.mark.parametrize(("name", "gen_length"), [("", 36), ("_ledger", 60), ("_llada", 256)])
def test_own_order_is_of_recorded_tokens(name: str, gen_length: int) -> None:
    recipe = shipped(f"own_order{name}")
    assert recipe.rollouts.misfit(gen_length) is None
    assert (recipe.rollouts.tokens, recipe.rollouts.decoding.rule) == ("recorded", "contiguous")
    assert (recipe.certainty_weight, recipe.views, recipe.asks_teacher) == (0.0, 1, False)


@pytest.mark.parametrize("file", sorted((CONFIGS / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_loads(file: Path) -> None:
    assert file.read_text(encoding="utf-8").startswith("# ")
    load_config(RecipeConfig, file)


@pytest.mark.parametrize("file", sorted((CONFIGS / "deepspeed").glob("*.json")), ids=lambda file: file.stem)
def test_every_zero_setting_is_accepted(file: Path) -> None:
    settings = json.loads(file.read_text(encoding="utf-8"))
    made = deepspeed_config(training_config(deepspeed=settings), 1, 2, 1, torch.float32)
    assert made["zero_optimization"].items() >= settings["zero_optimization"].items()
