"""Kept patches are drawn once a step, for all micro-batches and chunks of a rank, and are those of every position."""

import numpy as np
import pytest
import torch

from data.order.stateless import kept_patches
from engine.feed import LocalBatch
from engine.objectives.contrastive.towers import KeptPatches
from models.config import VisionConfig

VISION = VisionConfig(image_size=56, patch_size=14)


def batch(first: int) -> LocalBatch:
    return LocalBatch(positions=np.arange(first, first + 6), images=None, tokens=torch.empty(0))


def kept(dropout: float, frames: int = 1) -> KeptPatches:
    return KeptPatches(VISION, patch_dropout=dropout, seed=3, frames=frames, device=torch.device("cpu"))


@pytest.mark.parametrize("frames", [1, 2])
def test_a_micro_batch_has_the_patches_of_its_positions(frames: int) -> None:
    patches = kept(0.5, frames)
    for first in (0, 40):
        local = batch(first)
        for start in (0, 2, 4):
            alone = kept_patches(3, np.arange(first + start, first + start + 2), 16, 8, frames)
            found = patches.of(local, slice(start, start + 2))
            assert found is not None and torch.equal(found, torch.from_numpy(alone))


def test_they_are_on_the_device_once_a_step() -> None:
    patches, local = kept(0.5), batch(0)

    def place(of: LocalBatch, row: int) -> int:
        found = patches.of(of, slice(row, row + 1))
        assert found is not None
        return found.untyped_storage().data_ptr()

    places = {place(local, row) for row in (0, 5, 0)}
    assert len(places) == 1
    assert place(batch(0), 0) not in places


def test_nothing_is_drawn_where_nothing_is_dropped() -> None:
    assert kept(0.0).of(batch(0), slice(0, 2)) is None
