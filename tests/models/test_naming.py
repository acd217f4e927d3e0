"""Logical names: one per tensor of the whole model, and slices that tile it."""

from itertools import pairwise

import pytest
import torch

from engine.config.read import preset_model
from engine.parallel.mesh import Mesh
from models.tensors.naming import LogicalTensor, logical_tensors
from models.towers.text import TextTower
from models.towers.vision import VisionTower
from tests.golden import ARCHITECTURES, logical, model_of


@pytest.mark.parametrize("fixture", ARCHITECTURES)
def test_names_and_shapes_are_those_of_the_authors_tensors(fixture: str, mesh: Mesh) -> None:
    model = model_of(fixture)
    towers = {
        "vision": VisionTower(model, groups=mesh.vision_groups()),
        "text": TextTower(model, groups=mesh.text_groups()),
    }
    tables = [logical_tensors(tower, name, 0, 1).values() for name, tower in towers.items()]
    ours = {tensor.name: tensor.shape for table in tables for tensor in table}
    theirs = {name: tuple(value.shape) for name, value in logical(fixture, "weights").items()}
    assert ours | {"logit_scale.log_scale": (1,)} == theirs


@pytest.mark.parametrize("cuts", [[0, 4], [0, 2, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4]])
def test_stages_share_out_the_whole_tower(cuts: list[int], mesh: Mesh) -> None:
    model = model_of("tiny-18b")

    def names(start: int, stop: int) -> list[str]:
        stage = VisionTower(model, groups=mesh.vision_groups(), layers=range(start, stop))
        return [tensor.name for tensor in logical_tensors(stage, "vision", start, 1).values()]

    parts = [name for start, stop in pairwise(cuts) for name in names(start, stop)]
    assert sorted(parts) == sorted(names(0, 4))
    assert len(set(parts)) == len(parts)


@pytest.mark.parametrize("preset", ["18b", "8b", "e14-plus", "b16"])
def test_slices_of_the_tensor_axis_tile_each_tensor(preset: str, mesh: Mesh) -> None:
    model = preset_model(preset)
    with torch.device("meta"):
        tower = VisionTower(model, groups=mesh.vision_groups(), layers=range(1))
    for tensor in logical_tensors(tower, "vision", 0, 1).values():
        whole = torch.empty(tensor.shape, device="meta")
        for size in (2, 4):
            pieces = [whole[tensor.slice_of(rank, size)] for rank in range(size)]
            if tensor.split_dim is None:
                assert all(piece.shape == whole.shape for piece in pieces)
            else:
                assert torch.cat(pieces, dim=tensor.split_dim).shape == whole.shape


def test_a_slice_is_consecutive() -> None:
    tensor = LogicalTensor("vision.blocks.0.attn.proj.weight", (2, 6), 1)
    whole = torch.arange(12).view(2, 6)
    assert whole[tensor.slice_of(1, 3)].tolist() == [[2, 3], [8, 9]]
