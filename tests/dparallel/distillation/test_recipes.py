import json
from pathlib import Path

import pytest
import torch

from dparallel.config import RecipeConfig
from dparallel.config_files import load_config
from dparallel.distillation.engine import deepspeed_config
from tests.dparallel.distillation.conftest import training_config

CONFIGS = Path(__file__).parents[3] / "configs"


def recipe(name: str) -> RecipeConfig:
    return load_config(RecipeConfig, CONFIGS / "recipes" / f"{name}.yaml")


def test_the_ablation_differs_in_one_setting() -> None:
    certainty_forcing, consistency = recipe("certainty_forcing"), recipe("consistency")
    assert (certainty_forcing.certainty_weight, certainty_forcing.certainty_temperature) == (2.0, 0.5)
    assert certainty_forcing.eos_region_ratio == 1.0  # published: blocks are drawn uniformly
    assert consistency == certainty_forcing.model_copy(update={"certainty_weight": 0.0})


def test_trajectory_ordered_has_one_view() -> None:
    assert recipe("trajectory_ordered").masking == "trajectory"
    assert recipe("trajectory_ordered").views == 1
    assert recipe("trajectory_ordered").eos_region_ratio == 0.1


@pytest.mark.parametrize("file", sorted((CONFIGS / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_loads(file: Path) -> None:
    assert file.read_text().startswith("# ")
    load_config(RecipeConfig, file)


@pytest.mark.parametrize("file", sorted((CONFIGS / "deepspeed").glob("*.json")), ids=lambda file: file.stem)
def test_every_zero_setting_is_accepted(file: Path) -> None:
    settings = json.loads(file.read_text())
    made = deepspeed_config(training_config(deepspeed=settings), 1, 2, 1, torch.float32)
    assert made["zero_optimization"].items() >= settings["zero_optimization"].items()
