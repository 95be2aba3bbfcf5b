"""Valid and invalid recipes, and recipes resolved at a point of the training."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dparallel.config.base import ConfigError
from dparallel.config.files import load_config
from dparallel.config.recipe import RecipeConfig

BLOCK = {"masking": "random", "block_length": 8}
RESPONSE = {"region": "response", "block_length": 8}
MONOTONE = {**RESPONSE, "masking": "monotone"}
GROUP = {**BLOCK, "masking": "group", "group": {"blocks": 2}, "attention": "block_causal"}
SPLIT = {"region": "response", "masking": "trajectory", "near_far": {"delta": 4}}
ROLLOUTS = {"every": 10, "prompts": 8, "decoding": {"gen_length": 32}}
OWN_ORDER = {
    "region": "response",
    "masking": "trajectory",
    "rollouts": {**ROLLOUTS, "tokens": "recorded"},
}


def decoded(**settings: Any) -> dict[str, Any]:
    """The student's own order with other settings of its decoding."""
    rollouts = {**ROLLOUTS, "tokens": "recorded", "decoding": {"gen_length": 32, **settings}}
    return {**OWN_ORDER, "rollouts": rollouts}


CURRICULUM = RecipeConfig(
    masking="trajectory",
    block_length={"start": 6, "end": 12},
    mask_ratio=[{"start": 0.0, "end": 0.8}, 0.8],
    complement=True,
)


def test_schedules_by_hand() -> None:
    """The divisors of 36 from 6 to 12 are 6, 9 and 12, each for a third of the training."""
    points = [CURRICULUM.at(progress, 36) for progress in (0.0, 0.33, 0.34, 0.66, 0.67, 1.0)]
    assert [point.block_length for point in points] == [6, 6, 9, 9, 12, 12]
    assert [point.mask_ratio for point in points[:2]] == [(0.0, 0.8), pytest.approx((0.264, 0.8))]
    assert points[-1].mask_ratio == (0.8, 0.8)
    assert CURRICULUM.at(0.5, 256 * 3).block_length == 8  # of 6, 8 and 12
    assert (points[-1].masking, points[-1].complement) == ("trajectory", True)
    falling = RecipeConfig(**BLOCK, mask_ratio={"start": 1.0, "end": 0.5})
    assert [falling.at(progress, 8).mask_ratio for progress in (0, 0.5, 1)] == [1.0, 0.75, 0.5]


def test_without_schedules_every_point_is_the_same() -> None:
    recipe = RecipeConfig(**BLOCK)
    assert recipe.at(0.7, 16) == recipe
    assert (recipe.mask_ratio, recipe.fixed_block_length) == (0.5, 8)
    whole = RecipeConfig(region="response", masking="trajectory")
    assert whole.at(0.7, 16) == whole
    assert (whole.mask_ratio, whole.fixed_block_length) == (None, None)


@given(st.floats(0, 1), st.integers(1, 6), st.integers(1, 6), st.integers(1, 4))
def test_a_growing_block_divides_and_never_shrinks(
    progress: float, start: int, factor: int, other: int
) -> None:
    gen_length = start * factor * other
    recipe = RecipeConfig(masking="random", block_length={"start": start, "end": start * factor})
    assert recipe.misfit(gen_length) is None
    length = recipe.at(progress, gen_length).block_length
    assert start <= length <= start * factor
    assert gen_length % length == 0
    assert recipe.at(0.0, gen_length).block_length == start
    assert recipe.at(1.0, gen_length).block_length == start * factor
    assert recipe.at(progress / 2, gen_length).block_length <= length


def test_schedules_are_not_read_as_numbers() -> None:
    with pytest.raises(ValueError, match=r"block_length=\{'start': 6, 'end': 12\} grows over .* at a point"):
        _ = CURRICULUM.fixed_block_length
    with pytest.raises(ValueError, match=r"mask_ratio: \{'start': 0\.0, 'end': 0\.8\} changes .* at a point"):
        CURRICULUM.ratio_bounds()
    assert CURRICULUM.at(0.5, 36).ratio_bounds() == CURRICULUM.ratio_bounds(0.5) == (0.4, 0.8)


def test_what_does_not_divide_a_response_is_named() -> None:
    assert CURRICULUM.misfit(36) is None
    assert CURRICULUM.misfit(32) == "block_length.start=6"
    assert CURRICULUM.misfit(30) == "block_length.end=12"
    assert RecipeConfig(**BLOCK).misfit(36) == "block_length=8"
    assert RecipeConfig(region="response", masking="random").misfit(37) is None


def test_the_longest_region() -> None:
    assert CURRICULUM.region_length(36) == 12
    assert RecipeConfig(**BLOCK).region_length(36) == 8
    assert RecipeConfig(**MONOTONE, mask_ratio=[0.2, 0.7]).region_length(36) == 36
    assert RecipeConfig(**GROUP).region_length(36) == 16
    assert RecipeConfig(**{**GROUP, "group": {"blocks": 9}}).region_length(36) == 36


def test_recipes_without_the_added_settings_keep_their_keys() -> None:
    """What is recorded of a recipe is what it was before these settings came."""
    before = {
        "region", "block_length", "masking", "mask_ratio", "complement", "attention", "targets", "weighting",
        "cross_entropy_weight", "certainty_weight", "certainty_temperature", "certainty_on_complement",
        "eos_region_ratio",
    }  # fmt: skip
    assert set(CURRICULUM.what()) == before
    assert set(RecipeConfig(**SPLIT).what()) == before | {"near_far"}
    own = RecipeConfig(**BLOCK, own_tokens=0.0, only_correct=False)
    assert set(own.what()) == before | {"own_tokens", "only_correct"}
    rollouts = RecipeConfig(**BLOCK, targets="teacher", rollouts=ROLLOUTS)
    assert rollouts.what()["rollouts"].items() >= {"every": 10, "prompts": 8}.items()
    assert "tokens" not in rollouts.what()["rollouts"]
    recorded = RecipeConfig(**OWN_ORDER)
    assert recorded.what()["rollouts"]["tokens"] == "recorded"
    assert rollouts.how() == {"rollouts": {"batch_size": 64}}


@pytest.mark.parametrize("recipe", [CURRICULUM, RecipeConfig(**MONOTONE, mask_ratio=[0.2, 0.7])])
def test_a_recipe_survives_json(recipe: RecipeConfig) -> None:
    assert RecipeConfig.model_validate(recipe.model_dump(mode="json")) == recipe
    assert RecipeConfig.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"masking": "random"},
            "region='block'.* with block_length=None: it works by blocks; give block_len",
        ),
        (
            {**RESPONSE, "masking": "random"},
            "block_length=8: nothing here works by blocks; drop block_length",
        ),
        ({**MONOTONE, "block_length": None, "mask_ratio": [0, 1]}, "give block_length"),
        ({"region": "response", "masking": "random", "attention": "block_causal"}, "give block_length"),
        ({**BLOCK, "masking": "monotone", "mask_ratio": [0.2, 0.7]}, "set region: response, or masking"),
        (MONOTONE, r"masking='monotone' with mask_ratio=None: give mask_ratio=\[low, high\]"),
        ({**MONOTONE, "mask_ratio": 0.5}, r"mask_ratio=0\.5: give mask_ratio=\[low, high\]"),
        ({**BLOCK, "mask_ratio": 0}, "mask_ratio=0.* masks nothing at the start of training"),
        ({**BLOCK, "mask_ratio": {"start": 1, "end": 0}}, "masks nothing at the end of training"),
        ({**BLOCK, "mask_ratio": [0.7, 0.2]}, r"at the start of training low=0\.7 is above high=0\.2"),
        (
            {**BLOCK, "mask_ratio": [{"start": 0.0, "end": 0.9}, 0.8]},
            r"mask_ratio=\[\{'start': 0\.0, 'end': 0\.9\}, 0\.8\]: at the end of training low=0\.9 is above",
        ),
        ({**BLOCK, "mask_ratio": 2}, r"mask_ratio: Input should be less than or equal to 1, got 2"),
        ({**BLOCK, "mask_ratio": "half"}, "mask_ratio: Input should be a valid number, got 'half'"),
        (
            {**BLOCK, "mask_ratio": [0.1, 0.2, 0.3]},
            r"mask_ratio: .* at most 2 items .*, got \[0.1, 0.2, 0.3\]",
        ),
        (
            {**BLOCK, "mask_ratio": [0.1, [0.2]]},
            r"mask_ratio\.1: Give a number .* or \{start: .*, got \[0.2\]",
        ),
        ({**BLOCK, "mask_ratio": {"start": 0.1}}, r"mask_ratio\.end: required key is missing"),
        ({**BLOCK, "block_length": {"start": 12, "end": 6}}, "block_length: start=12 is above end=6: swap"),
        ({**BLOCK, "block_length": 0}, "block_length: Input should be greater than 0, got 0"),
        (
            {**BLOCK, "block_length": [8]},
            r"block_length: Give a number of positions, or \{start: .*got \[8\]",
        ),
        (
            {**BLOCK, "masking": "trajectory", "weighting": "inverse_ratio"},
            "weighting='inverse_ratio' with masking='trajectory'.* use weighting='view_mean'",
        ),
        (
            {**MONOTONE, "masking": "group", "group": {"blocks": 2}, "attention": "block_causal"},
            "masking='group' with region='response': .* set region: block",
        ),
        ({**BLOCK, "masking": "group"}, r"masking='group' with group=None: give the section group"),
        (
            {**BLOCK, "masking": "group", "group": {"blocks": 2}},
            "masking='group' with attention='full': .*; set attention: block_causal",
        ),
        ({**GROUP, "mask_ratio": 0.5}, r"masking='group' with mask_ratio=0\.5: .* drop mask_ratio"),
        ({**GROUP, "weighting": "inverse_ratio"}, "with masking='group': its positions are not drawn indep"),
        ({**GROUP, "group": {"blocks": 1}}, r"group\.blocks: Input should be greater than or equal to 2"),
        (
            {**GROUP, "group": {"blocks": 2, "high": [0.2, 1.0]}},
            r"group: low=\[0\.001, 0\.3\], high=\[0\.2, 1\.0\]: the four numbers must ascend",
        ),
        ({**BLOCK, "group": {"blocks": 2}}, "group with masking='random': it has no effect; set masking: g"),
        ({**BLOCK, "near_far": {}}, "near_far with masking='random': .* set masking: trajectory"),
        ({**SPLIT, "complement": True}, "near_far with complement=true: .* set complement: false"),
        ({**SPLIT, "targets": "teacher"}, "near_far with targets='teacher': .*; drop targets"),
        ({**SPLIT, "near_far": {"delta": 0}}, r"near_far\.delta: Input should be greater than 0, got 0"),
        ({**SPLIT, "own_tokens": 0.5}, r"own_tokens=0\.5 with near_far: .* without near_far"),
        ({**BLOCK, "own_tokens": 0.5, "certainty_weight": 1}, "own_tokens=.* set certainty_weight: 0"),
        ({**BLOCK, "own_tokens": 0.5, "complement": True}, r"own_tokens=0\.5 with complement=true: "),
        (
            {**BLOCK, "own_tokens": 0.5, "weighting": "inverse_ratio"},
            r"own_tokens=0\.5 with weighting='inverse_ratio': .* use weighting='view_mean'",
        ),
        ({**BLOCK, "teacher_prompt": "privileged"}, "teacher_prompt='privileged' with targets='trajectory'"),
        (
            {**SPLIT, "rollouts": ROLLOUTS},
            "rollouts with targets='trajectory', cross_entropy_weight=1: .* set rollouts.tokens: recorded, ",
        ),
        (
            {**BLOCK, "targets": "teacher", "rollouts": {**ROLLOUTS, "tokens": "recorded"}},
            "rollouts.tokens='recorded' with masking='random': .* set masking: trajectory, or drop rollouts",
        ),
        (
            {
                **SPLIT,
                "near_far": None,
                "cross_entropy_weight": 0,
                "certainty_weight": 1,
                "rollouts": ROLLOUTS,
            },
            "rollouts with targets='trajectory', cross_entropy_weight=0: the tokens are the student's own",
        ),
        (
            {**decoded(block_length=16, mode="pipelined"), "attention": "block_causal", "block_length": 8},
            "block_length=8 with rollouts.decoding.block_length=16: .*'block_causal' .* both the same value",
        ),
        (
            decoded(mode="revising"),
            r"rollouts\.decoding\.mode='revising' with masking='trajectory': .* use mode='sequential' or",
        ),
        (
            decoded(eos_fill="immediate"),
            r"rollouts\.decoding\.eos_fill='immediate' with rollouts\.tokens='recorded': .* drop eos_fill",
        ),
        (
            decoded(rule="learned", threshold=0.9),
            r"rollouts\.decoding\.rule='learned': .* after training; use another rule",
        ),
        (
            {**decoded(rule="steps", steps=4), "near_far": {"delta": 4}},
            r"near_far\.delta=4 leaves no token far: rollouts\.decoding has at most 4 forward passes",
        ),
        (
            {**decoded(block_length=16), "region": "block", "block_length": 8},
            "block_length=8 with rollouts.decoding.block_length=16: earlier blocks .*, or region: response",
        ),
        (
            {**decoded(block_length=16), "region": "block", "block_length": {"start": 8, "end": 16}},
            "block_length=8 with rollouts.decoding.block_length=16: earlier blocks",
        ),
        (
            {**decoded(mode="multi_block", block_length=8), "region": "block", "block_length": 8},
            r"rollouts\.decoding\.mode='multi_block' with region='block': .*; use it, or region: response",
        ),
        (
            {**GROUP, "targets": "teacher", "rollouts": ROLLOUTS},
            r"rollouts\.decoding\.mode='sequential' with attention='block_causal': .* with mode='pipelined'",
        ),
        ({**BLOCK, "certainty_on_complement": False}, "with complement=false: there is no complement view"),
        ({**BLOCK, "cross_entropy_weight": 0}, "certainty_weight=0: nothing is left of the loss"),
    ],
)
def test_recipes_without_sense(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        RecipeConfig(**settings)
    assert "\n" not in str(error.value)


def test_a_file_names_the_key_once(tmp_path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("{masking: random, block_length: 8, mask_ratio: [0.2, {begin: 0.5}]}", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"recipe\.yaml: mask_ratio\.1\.begin: unknown key; known: end, st"
    ) as e:
        load_config(RecipeConfig, file)
    assert str(e.value).count("mask_ratio") == 1
