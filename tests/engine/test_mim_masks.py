"""Block-wise masks: the authors' from Python's generator; stateless ones with the same distribution."""

import random

import numpy as np
import pytest

from data.errors import DataError
from data.pixels.masks import BlockMasks
from tests.golden import load_json, load_tensors

RECIPES = load_json("g8-mim/meta.json")["masks"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe["key"])
def test_the_authors_masks(recipe: dict) -> None:
    generator = BlockMasks(
        grid=recipe["grid"],
        masked=recipe["num_masking_patches"],
        min_block=recipe["min_num_patches"],
        max_block=recipe["max_num_patches"],
        min_aspect=recipe["min_aspect"],
    )
    reference = load_tensors("g8-mim/masks")[recipe["key"]].numpy().astype(bool)
    for seed, masks in zip(recipe["seeds"], reference, strict=True):
        source = random.Random(seed)
        for mask in masks:
            np.testing.assert_array_equal(generator.draw(source), mask)


def test_stateless_masks_have_the_same_distribution() -> None:
    generator, count = BlockMasks(), 1000
    ours = generator.of_samples(0, np.arange(count)).sum(axis=1)
    source = random.Random(0)
    authors = np.array([generator.draw(source).sum() for _ in range(count)])
    assert ours.max() == authors.max() == 105
    assert ours.mean() == pytest.approx(authors.mean(), abs=0.15)  # standard error of the difference: 0.04
    assert (ours == 105).mean() == pytest.approx((authors == 105).mean(), abs=0.1)


def test_every_patch_is_masked_about_equally_often_as_the_authors() -> None:
    generator, count = BlockMasks(), 1000
    ours = generator.of_samples(1, np.arange(count)).mean(axis=0)
    source = random.Random(1)
    authors = np.mean([generator.draw(source).ravel() for _ in range(count)], axis=0)
    assert np.abs(ours - authors).max() < 0.11  # 5 standard errors


def test_a_mask_depends_on_seed_and_position_alone() -> None:
    generator = BlockMasks(grid=8, masked=26, min_block=4)
    together = generator.of_samples(3, np.array([5, 900, 7]))
    np.testing.assert_array_equal(together[1:2], generator.of_samples(3, np.array([900])))
    assert (together[0] != together[2]).any()
    assert (together != generator.of_samples(4, np.array([5, 900, 7]))).any()


def test_no_positions_give_no_masks() -> None:
    assert BlockMasks().of_samples(0, np.arange(0)).shape == (0, 256)


def test_more_masked_patches_than_the_grid_has_are_refused() -> None:
    with pytest.raises(DataError, match="70 masked patches: a 8 x 8 grid allows 1 to 64"):
        BlockMasks(grid=8, masked=70)


@pytest.mark.parametrize("settings", [{"min_block": 27}, {"min_block": 0}, {"min_block": 16, "max_block": 15}])
def test_blocks_that_leave_masks_empty_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(DataError, match=r"min_block \d+ is not between 1 and the (26|15) patches"):
        BlockMasks(grid=8, masked=26, **settings)
