"""The teacher's patch features against the authors' (fixture g8-mim: the tower of tiny-bigE)."""

import pytest
import torch

from data.transforms import normalise
from engine.mesh import Mesh
from models.mim import teacher_features
from models.naming import logical_tensors
from models.vision import VisionTower
from tests.golden import TOLERANCE, deviation, load_tensors, logical, model_of

TEACHER = "tiny-bigE"


def _teacher(mesh: Mesh) -> VisionTower:
    tower = VisionTower(model_of(TEACHER), groups=mesh.vision_groups())
    weights, names = logical(TEACHER, "weights"), logical_tensors(tower, "vision", 0, 1)
    with torch.no_grad():
        for local, parameter in tower.named_parameters():
            parameter.copy_(weights[names[local].name])
    return tower


def test_patch_features_of_the_authors_teacher(mesh: Mesh) -> None:
    io = load_tensors("g8-mim/io")
    features = teacher_features(_teacher(mesh), normalise(io["images_u8"], torch.float32))
    assert deviation(features, io["teacher_patch_features"]) < TOLERANCE
    masked = features[io["mask"].bool()]
    assert deviation(masked, io["targets"]) < TOLERANCE
    assert not features.requires_grad


def test_a_part_of_a_tower_is_refused_as_teacher(mesh: Mesh) -> None:
    stage = VisionTower(model_of(TEACHER), groups=mesh.vision_groups(), layers=range(0, 2))
    with pytest.raises(ValueError, match="must be a whole tower, not blocks 0 to 1 of 4 at TP 1"):
        teacher_features(stage, torch.zeros(1, 3, 56, 56))
