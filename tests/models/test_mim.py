"""The teacher's patch features against the authors' (fixture g8-mim: the tower of tiny-bigE)."""

import pytest
import torch

from data.pixels.transforms import normalise
from engine.parallel.mesh import Mesh
from models.config import ModelConfigError, VisionConfig
from models.tensors.naming import logical_tensors
from models.towers.mim import check_grids, resize_for_teacher, teacher_features
from models.towers.vision import VisionTower
from tests.golden import TOLERANCE, deviation, load_tensors, logical, model_of
from tests.models.students import build_student

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


def test_a_student_is_refused_as_teacher(mesh: Mesh) -> None:
    with pytest.raises(ValueError, match="not a MIM student"):
        teacher_features(build_student("style18b", mesh), torch.zeros(1, 3, 56, 56))


# --- teachers of another resolution ----------------------------------------------------------------------------------


def test_grids_must_agree_whatever_the_resolutions() -> None:
    student = VisionConfig(image_size=224, patch_size=14)
    check_grids(student, VisionConfig(image_size=256, patch_size=16))
    with pytest.raises(ModelConfigError) as caught:
        check_grids(student, VisionConfig(image_size=336, patch_size=14))
    said = str(caught.value)
    assert "16 x 16 patches (image 224 / patch 14)" in said and "24 x 24 (image 336 / patch 14)" in said
    assert "model.vision.image_size=336" in said and "a teacher of image size 224" in said


def test_the_teacher_sees_the_same_crop_at_its_own_size(mesh: Mesh) -> None:
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    slope = torch.stack([rows, columns, rows + columns]).expand(2, 3, 64, 64)
    small = resize_for_teacher(slope, model_of(TEACHER).vision)
    assert small.shape == (2, 3, 56, 56)
    # A slope stays the slope: pixel centres of the small picture, away from the border.
    centres = ((torch.arange(56) + 0.5) * 64 / 56 - 0.5) * 2 / 63 - 1
    torch.testing.assert_close(small[0, 1, 20, 4:-4], centres[4:-4], rtol=0, atol=1e-3)
    torch.testing.assert_close(small[0, 0, 4:-4, 20], centres[4:-4], rtol=0, atol=1e-3)
    assert teacher_features(_teacher(mesh), small).shape == (2, 16, 32)
    assert resize_for_teacher(small, model_of(TEACHER).vision) is small
    assert resize_for_teacher(slope.bfloat16(), model_of(TEACHER).vision).dtype == torch.bfloat16
