import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dparallel.config import RecipeConfig
from dparallel.distillation.corruption import (
    View,
    content_length,
    draw_block,
    mask_at_random,
    mask_by_trajectory,
    view,
)
from dparallel.distillation.recipe import make_views

EOS, MASK = 2, 1


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def block_shares(response: list[int], eos_region_ratio: float) -> np.ndarray:
    generator = rng()
    draws = [
        draw_block(np.array(response), 2, EOS, eos_region_ratio, generator).start // 2 for _ in range(8000)
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
    assert content_length(np.array([5, EOS, 5, EOS]), EOS) == 2
    assert content_length(np.array([5, 5]), EOS) == 2


def test_view_by_hand() -> None:
    made = view(np.array([True, False]), slice(2, 4), gen_length=6)
    assert made.masked.tolist() == [False, False, True, False, True, True]
    assert made.read.tolist() == [False, False, True, False, False, False]


def test_random_masks_have_their_ratio() -> None:
    assert mask_at_random(20_000, 0.3, rng()).mean() == pytest.approx(0.3, abs=0.015)
    assert mask_at_random(5, 1.0, rng()).all()


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
    ]
)


def semi_autoregressive(steps: list[int]) -> np.ndarray:
    """Commit steps in which every block of 4 comes after the one before."""
    return np.array([step + 4 * (index // 4) for index, step in enumerate(steps)])


@settings(deadline=None)
@given(trajectories, recipes, st.integers(0, 2**31))
def test_invariants_of_views(
    trajectory: tuple[list[int], list[int]], recipe: RecipeConfig, seed: int
) -> None:
    response, commit_step = np.array(trajectory[0]), semi_autoregressive(trajectory[1])
    views = make_views(recipe, response, commit_step, EOS, rng(seed))
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
        assert region.sum() == (recipe.block_length or len(response))
        assert np.ptp(np.flatnonzero(region)) == region.sum() - 1
    if recipe.masking == "trajectory":
        (only,) = views
        assert only.read.any()
        canvases = [(commit_step >= step).tolist() for step in np.unique(commit_step)]
        assert only.masked.tolist() in canvases  # a canvas that decoding really met


def test_the_recipes_ratios_reach_its_views() -> None:
    generator, row = rng(), (np.array([7] * 999 + [EOS] * 1001), np.arange(2000), EOS)
    for mask_ratio in (0.1, 0.9):
        recipe = RecipeConfig(region="response", masking="random", mask_ratio=mask_ratio)
        (made,) = make_views(recipe, *row, generator)
        assert made.read.mean() == pytest.approx(mask_ratio, abs=0.03)
    for eos_region_ratio, padding_share in ((0.0, 0.0), (0.5, 1 / 3), (1.0, 0.5)):
        # the first EOS, at 999, ends the content: two blocks of content, two of padding
        recipe = RecipeConfig(block_length=500, masking="random", eos_region_ratio=eos_region_ratio)
        starts = [np.flatnonzero(make_views(recipe, *row, generator)[0].read)[0] for _ in range(1500)]
        assert np.mean(np.array(starts) >= 1000) == pytest.approx(padding_share, abs=0.05)


def test_views_depend_on_their_own_generator_only() -> None:
    recipe = RecipeConfig(block_length=4, masking="random", complement=True)
    row = (np.arange(3, 11), np.arange(8), EOS)
    assert same(make_views(recipe, *row, rng(5)), make_views(recipe, *row, rng(5)))
    assert not same(make_views(recipe, *row, rng(5)), make_views(recipe, *row, rng(6)))


def same(left: list[View], right: list[View]) -> bool:
    return all(
        np.array_equal(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True)
    )
