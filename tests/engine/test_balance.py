"""Stages by cost: blocks go where the slowest chunk stays shortest; `balanced` is a list before anything runs."""

from itertools import product

import pytest

from engine.config.read import ConfigError, preset_model, resolve
from engine.config.stages import balanced_layers, chunk_costs, even_layers, stage_layers
from models.config import ModelConfig, TextConfig, VisionConfig

GOOD = {"model": "tiny-18b", "data": {"shards": ["some.tar"]}}
HEAVY_ENDS = ModelConfig(
    embed_dim=4096,
    vision=VisionConfig(image_size=56, patch_size=14, depth=9, width=64, head_width=16, mlp_hidden=64),
    text=TextConfig(width=32, heads=4),
)
"""Patch embedding and projection weigh more than two blocks each."""


def test_large_towers_are_as_even_as_can_be() -> None:
    model = preset_model("18b")
    for stages in (1, 3, 12, 24):
        assert balanced_layers(model, stages=stages, virtual=1, tokens=129) == even_layers(48, stages)
    # The last stage takes an odd block before the middle does: the tower's last block costs a fifth of the others.
    assert balanced_layers(model, stages=5, virtual=1, tokens=129) == [9, 10, 10, 9, 10]


def test_heavy_ends_get_fewer_blocks() -> None:
    layers = balanced_layers(HEAVY_ENDS, stages=3, virtual=1, tokens=17)
    assert layers[0] < layers[1] > layers[2] and sum(layers) == 9


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_no_other_placement_is_faster(stages: int) -> None:
    found = max(chunk_costs(HEAVY_ENDS, balanced_layers(HEAVY_ENDS, stages=stages, virtual=1, tokens=17), 17))
    others = [counts for counts in product(range(1, 10), repeat=stages) if sum(counts) == 9]
    assert found == min(max(chunk_costs(HEAVY_ENDS, counts, 17)) for counts in others)


def test_chunks_of_one_rank_share_its_load() -> None:
    layers = balanced_layers(preset_model("18b"), stages=5, virtual=2, tokens=129)
    by_rank = [sum(layers[rank::5]) for rank in range(5)]
    assert sum(layers) == 48 and max(by_rank) - min(by_rank) <= 1 and max(layers) - min(layers) <= 1


@pytest.mark.parametrize(("stages", "virtual"), [(0, 1), (1, 0), (10, 1), (5, 2)])
def test_more_chunks_than_blocks_are_refused(stages: int, virtual: int) -> None:
    with pytest.raises(ValueError, match="at least one block"):
        balanced_layers(HEAVY_ENDS, stages=stages, virtual=virtual, tokens=17)


def test_layers_follow_each_other() -> None:
    assert stage_layers(5, 2) == [range(0, 3), range(3, 5)]
    assert stage_layers(5, 3, [1, 3, 1]) == [range(0, 1), range(1, 4), range(4, 5)]


def test_balanced_is_a_list_once_resolved() -> None:
    config = resolve(GOOD, ["parallel.layers=balanced", "parallel.pipeline=2"])
    assert config.parallel.layers == [1, 3]  # pixels to project on one side, a cheap last block on the other
    uneven = resolve(GOOD, ["parallel.layers=balanced", "parallel.pipeline=2", "model.embed_dim=20000"])
    assert uneven.parallel.layers == [3, 1]
    assert resolve(GOOD, ["parallel.layers=[1,3]", "parallel.pipeline=2"]).parallel.layers == [1, 3]
    assert resolve(GOOD, ["parallel.pipeline=2"]).parallel.layers is None


@pytest.mark.parametrize(
    "value", ["even", "3", "[1.5,2.5]", "{a: 1}", "[]", "true", "[1,'3']", "[true,3]", "[0,4]", "[2,3]", "[1,1,2]"]
)
def test_nonsense_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.layers"):
        resolve(GOOD, [f"parallel.layers={value}", "parallel.pipeline=2"])
