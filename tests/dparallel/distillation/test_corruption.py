import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dparallel.config.recipe import RecipeConfig
from dparallel.distillation.corruption import (
    View,
    content_length,
    draw_block,
    draw_ratio,
    draw_unread,
    mask_at_random,
    mask_by_trajectory,
    mask_from_point,
    monotone_ratios,
    view,
)
from dparallel.distillation.recipe import make_views

EOS, MASK = 2, 1


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def block_shares(response: list[int], eos_region_ratio: float) -> np.ndarray:
    generator = rng()
    draws = [
        draw_block(np.array(response), 2, (EOS,), eos_region_ratio, generator).start // 2 for _ in range(8000)
    ]
    return np.bincount(draws, minlength=len(response) // 2) / 8000


def test_padding_blocks_are_drawn_at_their_ratio() -> None:
    # The first EOS makes block 1 content; blocks 2 and 3 are padding: 1 : 1 : 0.5 : 0.5.
    shares = block_shares([7, 7, EOS, EOS, EOS, EOS, EOS, EOS], eos_region_ratio=0.5)
    assert shares == pytest.approx([1 / 3, 1 / 3, 1 / 6, 1 / 6], abs=0.02)


def test_first_eos_at_a_block_start_is_content() -> None:
    assert block_shares([7, 7, EOS, EOS, EOS, EOS], 0.0) == pytest.approx([0.5, 0.5, 0], abs=0.02)
    assert block_shares([7, EOS, EOS, EOS, EOS, EOS], 0.0).tolist() == [1, 0, 0]
    assert block_shares([7, 7, 7, 7], 0.0) == pytest.approx([0.5, 0.5], abs=0.02)


def test_content_length_by_hand() -> None:
    assert content_length(np.array([5, EOS, 5, EOS]), (EOS,)) == 2
    assert content_length(np.array([5, 5]), (EOS,)) == 2
    end_of_turn = 9  # it ends a response like the end of the text, which fills what follows
    assert content_length(np.array([5, end_of_turn, EOS, EOS]), (EOS, end_of_turn)) == 2


def test_view_by_hand() -> None:
    made = view(np.array([True, False]), slice(2, 4), gen_length=6)
    assert made.masked.tolist() == [False, False, True, False, True, True]
    assert made.read.tolist() == [False, False, True, False, False, False]
    assert made.weight.tolist() == [0, 0, 1, 0, 0, 0]


def test_weights_by_hand() -> None:
    chosen, region = np.array([True, True, False, True]), slice(1, 5)
    assert view(chosen, region, 6).weight == pytest.approx([0, 1 / 3, 1 / 3, 0, 1 / 3, 0])
    by_ratio = view(chosen, region, 6, ratio=np.array([0.5, 0.5, 0.0, 0.8]))
    assert by_ratio.weight == pytest.approx([0, 2, 2, 0, 1.25, 0])
    partly = view(chosen, region, 6, unread=np.array([True, False, False, False]))
    assert partly.weight == pytest.approx([0, 0, 0.5, 0, 0.5, 0])
    assert partly.read.tolist() == (partly.weight > 0).tolist()
    assert partly.masked.tolist() == [False, True, True, False, True, True]  # masked all the same
    nothing = view(np.zeros(4, dtype=bool), region, 6)
    assert nothing.weight.tolist() == [0] * 6


def test_random_masks_have_their_ratio() -> None:
    assert mask_at_random(np.full(20_000, 0.3), rng()).mean() == pytest.approx(0.3, abs=0.015)
    assert mask_at_random(np.ones(5), rng()).all()
    halves = mask_at_random(np.repeat([0.1, 0.9], 10_000), rng()).reshape(2, -1).mean(axis=1)
    assert halves == pytest.approx([0.1, 0.9], abs=0.015)


def test_monotone_ratios_have_their_means() -> None:
    """p_1 is uniform; the distance to `high` is halved on average by the last block, in equal steps."""
    generator = rng()
    drawn = np.array([monotone_ratios(5, 0.2, 0.7, generator) for _ in range(4000)])
    assert drawn.mean(axis=0) == pytest.approx(0.45 + 0.125 * np.arange(5) / 4, abs=0.01)
    assert (drawn[:, 0].min(), drawn[:, 0].max()) == pytest.approx((0.2, 0.7), abs=0.01)
    assert np.var(drawn[:, 0]) == pytest.approx(0.5**2 / 12, rel=0.05)
    assert monotone_ratios(1, 0.3, 0.3, generator).tolist() == [0.3]


@given(st.integers(1, 40), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**31))
def test_monotone_ratios_never_fall(blocks: int, one: float, other: float, seed: int) -> None:
    low, high = sorted((one, other))
    ratios = monotone_ratios(blocks, low, high, rng(seed))
    assert ratios.shape == (blocks,)
    assert (np.diff(ratios) >= 0).all()
    assert low <= ratios[0]
    assert ratios[-1] <= min(1, high + 1e-9)


def test_a_ratio_is_drawn_from_its_range() -> None:
    generator = rng()
    drawn = [draw_ratio(0.2, 0.6, generator) for _ in range(4000)]
    assert (min(drawn), np.mean(drawn), max(drawn)) == pytest.approx((0.2, 0.4, 0.6), abs=0.01)
    before = generator.bit_generator.state
    assert draw_ratio(0.5, 0.5, generator) == 0.5
    assert generator.bit_generator.state == before  # a fixed ratio is not drawn


def test_unread_blocks_by_hand() -> None:
    row = np.array([7, 7, 7, EOS, EOS, EOS, EOS, EOS])  # the first EOS makes the second block content
    left_out = [False] * 4 + [True] * 4
    assert draw_unread(row, 2, (EOS,), 0.0, rng()).tolist() == left_out
    assert not draw_unread(row, 2, (EOS,), 1.0, rng()).any()
    generator = rng()
    drawn = np.array([draw_unread(row, 2, (EOS,), 0.25, generator) for _ in range(4000)])
    assert drawn.mean(axis=0) == pytest.approx([0, 0, 0, 0, 0.75, 0.75, 0.75, 0.75], abs=0.03)
    assert (drawn[:, 4] == drawn[:, 5]).all()
    assert (drawn[:, 4] != drawn[:, 6]).any()  # each block for itself
    assert not draw_unread(np.full(4, 7), 2, (EOS,), 0.0, rng()).any()


def test_masks_from_a_point_by_hand() -> None:
    steps = np.array([4, 3, 3, 9])
    # of four, 1 - ratio are committed by: 9, 4, 3 (both of step 3), 3, before the first
    expected = {0.0: [3], 0.25: [3], 0.5: [0, 3], 0.75: [0, 3], 1.0: [0, 1, 2, 3]}
    for ratio, masked in expected.items():
        assert np.flatnonzero(mask_from_point(steps, ratio)).tolist() == masked
    assert mask_from_point(np.full(3, 5), 0.1).all()  # one step committed all


@given(st.lists(st.integers(0, 30), min_size=1, max_size=20), st.floats(0, 1))
def test_masks_from_a_point_are_the_teachers_own(steps: list[int], ratio: float) -> None:
    commit_step = np.array(steps)
    masked = mask_from_point(commit_step, ratio)
    assert masked.tolist() in [(commit_step >= step).tolist() for step in steps]
    if len(set(steps)) == len(steps):  # one token a step: the share is met to a position
        assert abs(masked.sum() - max(1, ratio * len(steps))) <= 0.5 + 1e-9
    assert masked.any()


def test_trajectory_masks_are_the_teachers_own_canvases() -> None:
    generator = rng()
    drawn = [mask_by_trajectory(np.array([4, 3, 3, 9]), generator) for _ in range(6000)]
    patterns, counts = np.unique(drawn, axis=0, return_counts=True)
    # steps 3, 4, 9 are equally likely
    assert patterns.tolist() == [[False, False, False, True], [True, False, False, True], [True] * 4]
    assert counts / 6000 == pytest.approx([1 / 3] * 3, abs=0.03)


trajectories = st.integers(1, 4).flatmap(
    lambda blocks: st.tuples(
        st.lists(st.integers(2, 9), min_size=4 * blocks, max_size=4 * blocks),
        st.lists(st.integers(0, 3), min_size=4 * blocks, max_size=4 * blocks),
    )
)
recipes = st.sampled_from(
    [
        RecipeConfig(block_length=4, masking="random", complement=True),
        RecipeConfig(block_length=4, masking="random", mask_ratio=0.9),
        RecipeConfig(block_length=4, masking="trajectory"),
        RecipeConfig(region="response", masking="random", complement=True),
        RecipeConfig(region="response", masking="trajectory"),
        RecipeConfig(block_length=4, masking="trajectory", mask_ratio=[0.3, 0.8], complement=True),
        RecipeConfig(
            region="response",
            block_length=4,
            masking="monotone",
            mask_ratio=[0.2, 0.7],
            complement=True,
            weighting="inverse_ratio",
            eos_region_ratio=1.0,
        ),
    ]
)


def semi_autoregressive(steps: list[int]) -> np.ndarray:
    """Commit steps in which every block of 4 follows the previous one."""
    return np.array([step + 4 * (index // 4) for index, step in enumerate(steps)])


@settings(deadline=None)
@given(trajectories, recipes, st.integers(0, 2**31))
def test_invariants_of_views(
    trajectory: tuple[list[int], list[int]], recipe: RecipeConfig, seed: int
) -> None:
    response, commit_step = np.array(trajectory[0]), semi_autoregressive(trajectory[1])
    views = make_views(recipe, response, commit_step, (EOS,), rng(seed))
    assert len(views) == recipe.views
    for made in views:
        assert not (made.read & ~made.masked).any()
        last_read = np.flatnonzero(made.read).max(initial=-1)
        later = made.masked & ~made.read
        assert later[np.flatnonzero(later).min(initial=len(later)) :].all()  # all masks to the end
        assert np.flatnonzero(later).min(initial=len(later)) > last_read
    if recipe.complement:
        first, second = views
        assert not (first.read & second.read).any()
        region = first.read | second.read
        assert region.sum() == recipe.region_length(len(response))
        assert np.ptp(np.flatnonzero(region)) == region.sum() - 1
    if recipe.masking == "trajectory":
        only = views[0]
        assert only.read.any()
        canvases = [(commit_step >= step).tolist() for step in np.unique(commit_step)]
        assert only.masked.tolist() in canvases  # a canvas that occurred in decoding
    for made in views:
        assert ((made.weight > 0) == made.read).all()
        if recipe.weighting == "view_mean":
            assert made.weight.sum() == pytest.approx(float(made.read.any()))


def test_the_recipes_ratios_reach_its_views() -> None:
    generator, row = rng(), (np.array([7] * 999 + [EOS] * 1001), np.arange(2000), (EOS,))
    for mask_ratio in (0.1, 0.9):
        recipe = RecipeConfig(region="response", masking="random", mask_ratio=mask_ratio)
        (made,) = make_views(recipe, *row, generator)
        assert made.read.mean() == pytest.approx(mask_ratio, abs=0.03)
    for eos_region_ratio, padding_share in ((0.0, 0.0), (0.5, 1 / 3), (1.0, 0.5)):
        # the first EOS, at 999, ends the content: two blocks of content, two of padding
        recipe = RecipeConfig(block_length=500, masking="random", eos_region_ratio=eos_region_ratio)
        starts = [np.flatnonzero(make_views(recipe, *row, generator)[0].read)[0] for _ in range(1500)]
        assert np.mean(np.array(starts) >= 1000) == pytest.approx(padding_share, abs=0.05)


def test_a_complement_weighs_by_its_own_ratio() -> None:
    """A position masked with probability p in one view is masked with 1 - p in the other."""
    settings = {"complement": True, "weighting": "inverse_ratio", "eos_region_ratio": 1.0}
    recipe = RecipeConfig(block_length=8, masking="random", mask_ratio=0.2, **settings)
    first, second = make_views(recipe, np.arange(8, 16), np.arange(8), (EOS,), rng(1))
    assert (first.weight + second.weight).tolist() == pytest.approx(np.where(first.read, 5, 1.25).tolist())


def test_views_depend_on_their_own_generator_only() -> None:
    recipe = RecipeConfig(block_length=4, masking="random", complement=True)
    row = (np.arange(3, 11), np.arange(8), (EOS,))
    assert same(make_views(recipe, *row, rng(5)), make_views(recipe, *row, rng(5)))
    assert not same(make_views(recipe, *row, rng(5)), make_views(recipe, *row, rng(6)))


def same(left: list[View], right: list[View]) -> bool:
    return all(
        np.array_equal(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True)
    )
