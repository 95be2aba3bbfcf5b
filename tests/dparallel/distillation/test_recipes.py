import json
from pathlib import Path

import pytest
import torch

from dparallel.config.files import load_config
from dparallel.config.recipe import RecipeConfig
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


@pytest.mark.parametrize("file", sorted((CONFIGS / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_loads(file: Path) -> None:
    assert file.read_text(encoding="utf-8").startswith("# ")
    load_config(RecipeConfig, file)


@pytest.mark.parametrize("file", sorted((CONFIGS / "deepspeed").glob("*.json")), ids=lambda file: file.stem)
def test_every_zero_setting_is_accepted(file: Path) -> None:
    settings = json.loads(file.read_text(encoding="utf-8"))
    made = deepspeed_config(training_config(deepspeed=settings), 1, 2, 1, torch.float32)
    assert made["zero_optimization"].items() >= settings["zero_optimization"].items()
