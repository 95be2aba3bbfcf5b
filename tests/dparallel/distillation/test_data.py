from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dparallel.config.base import ConfigError
from dparallel.config.experiment import StudentConfig
from dparallel.config.recipe import RecipeConfig
from dparallel.distillation.data import (
    Samples,
    check_samples,
    dropout_seed,
    load_samples,
    row_generator,
    sample_order,
    step_shape,
)
from dparallel.models.backbone import DiffusionConfig
from tests.dparallel.distillation.conftest import RECIPE, record, training_config, trajectory_rows


def test_rows_are_filtered_and_counted(trajectories: Path) -> None:
    rows = trajectory_rows(30)
    samples, counts = load_samples(trajectories, only_correct=True, max_length=47)
    kept = [row for row in rows if row["correct"] and len(row["prompt_ids"]) + 36 <= 47]
    assert counts == {
        "rows_read": 30,
        "left_out_incorrect": 6,
        "left_out_too_long": 12,
        "rows_used": len(kept),
    }
    assert [prompt.tolist() for prompt in samples.prompts] == [row["prompt_ids"] for row in kept]
    assert samples.responses.tolist() == [row["response_ids"] for row in kept]
    assert samples.commit_step.tolist() == [row["commit_step"] for row in kept]
    assert load_samples(trajectories, only_correct=False, max_length=None)[1]["rows_used"] == 30


def test_unknown_correctness_is_not_correct(tiny_checkpoint: Path, tmp_path: Path) -> None:
    rows = [{**row, "correct": None} for row in trajectory_rows(3)]
    folder = record(tmp_path / "unknown", tiny_checkpoint, rows)
    with pytest.raises(ConfigError, match=r"of 3 trajectories none is left .* 3 not known to be correct"):
        load_samples(folder, only_correct=True, max_length=None)
    assert len(load_samples(folder, only_correct=False, max_length=None)[0]) == 3


def test_nothing_left_and_uneven_responses(trajectories: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="24 longer than max_length=20"):
        load_samples(trajectories, only_correct=True, max_length=20)
    rows = trajectory_rows(2)
    rows[1]["response_ids"] = rows[1]["response_ids"][:24]
    folder = record(tmp_path / "uneven", tiny_checkpoint, rows)
    with pytest.raises(ConfigError, match=r"different lengths \[24, 36\]"):
        load_samples(folder, only_correct=False, max_length=None)


def model_config(**changes) -> DiffusionConfig:
    shape = {"vocab_size": 50, "mask_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
    return DiffusionConfig(**{**shape, **changes})


@pytest.mark.parametrize(
    ("recipe", "training", "expected"),
    [(None, True, True), (None, False, False), (False, True, False), (True, False, True)],
)
def test_a_recipe_overrides_whether_only_correct_responses_are_used(
    recipe: bool | None, training: bool, expected: bool
) -> None:
    masks = RecipeConfig(region="response", masking="random", only_correct=recipe)
    config = StudentConfig(training=training_config(only_correct=training), recipe=masks)
    assert config.only_correct == expected


@pytest.mark.parametrize(
    ("recipe", "model", "message"),
    [
        (RecipeConfig(block_length=8, masking="random"), {}, r"block_length=8 does not divide .* 36"),
        (RECIPE, {"vocab_size": 20}, r"token ids \d+ to \d+, the model knows 0 to 19"),
        (RECIPE, {"mask_token_id": 50}, r"mask_token_id is 50, outside its vocabulary \(0 to 49\)"),
        (RECIPE, {"mask_token_id": None}, "mask_token_id is None"),
        (RECIPE, {"eos_token_id": None}, "eos_token_id is None"),
        (
            RECIPE,
            {"max_position_embeddings": 47},
            "has 48 tokens, the model's max_position_embeddings is 47",
        ),
        (RECIPE, {"mask_token_id": 2, "eos_token_id": 3}, "hold mask_token_id=2 in a response"),
    ],
)
def test_what_does_not_fit_is_refused(
    trajectories: Path, recipe: RecipeConfig, model: dict, message: str
) -> None:
    samples, _ = load_samples(trajectories, only_correct=True, max_length=None)
    with pytest.raises(ConfigError, match=message):
        check_samples(samples, recipe, model_config(**model))


def test_what_fits_is_accepted(trajectories: Path) -> None:
    samples, _ = load_samples(trajectories, only_correct=True, max_length=None)
    check_samples(samples, RECIPE, model_config(max_position_embeddings=48))
    whole = Samples(samples.prompts, samples.responses[:, :35], samples.commit_step[:, :35])
    check_samples(whole, RecipeConfig(region="response", masking="random"), model_config())


@pytest.mark.parametrize(
    ("views_per_step", "micro", "views", "processes", "expected"),
    [
        (64, 64, 2, 1, (32, 32, 1)),
        (64, 64, 2, 2, (32, 16, 1)),  # micro_batch_size is at most a process's share
        (64, 8, 2, 2, (32, 4, 4)),
        (64, 16, 1, 1, (64, 16, 4)),
    ],
)
def test_step_shapes(
    views_per_step: int, micro: int, views: int, processes: int, expected: tuple[int, int, int]
) -> None:
    config = training_config(views_per_step=views_per_step, micro_batch_size=micro)
    assert step_shape(config, views, processes) == expected


@pytest.mark.parametrize(
    ("views_per_step", "micro", "views", "processes", "message"),
    [
        (63, 8, 2, 1, "views_per_step=63 is not divisible by 1 processes x 2 views"),
        (64, 8, 1, 3, "choose a multiple of 3"),
        (64, 24, 2, 1, "micro_batch_size=24 does not divide a process's 64 views"),
        (64, 1, 2, 1, "into whole samples of 2 views"),
    ],
)
def test_steps_that_do_not_divide(
    views_per_step: int, micro: int, views: int, processes: int, message: str
) -> None:
    config = training_config(views_per_step=views_per_step, micro_batch_size=micro)
    with pytest.raises(ConfigError, match=message):
        step_shape(config, views, processes)


@given(st.integers(0, 100), st.integers(1, 40), st.integers(1, 40))
def test_every_epoch_draws_every_sample_once(seed: int, per_step: int, samples: int) -> None:
    steps = -(-3 * samples // per_step)
    drawn = np.concatenate([sample_order(seed, step, per_step, samples) for step in range(1, steps + 1)])
    for epoch in range(3):
        assert sorted(drawn[epoch * samples : (epoch + 1) * samples]) == list(range(samples))


def test_order_differs_between_epochs_and_seeds() -> None:
    first, second, other = (sample_order(*key, 50, 50).tolist() for key in ((0, 1), (0, 2), (1, 1)))
    assert first != second
    assert first != other


def test_rows_and_dropout_have_streams_of_their_own() -> None:
    drawn = {row_generator(*key).random() for key in ((0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0))}
    assert len(drawn) == 4
    assert row_generator(3, 4, 5).random() == row_generator(3, 4, 5).random()
    assert len({dropout_seed(*key) for key in ((0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0))}) == 4
