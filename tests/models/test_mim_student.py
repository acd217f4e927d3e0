"""The MIM student in one process: the authors' predictions, loss and gradients, fresh weights, what is refused."""

import math

import pytest
import torch
from torch import Tensor

from engine.config.read import OptimConfig
from engine.objectives.mim.loss import distillation_loss
from engine.optim.groups import tensor_group
from engine.parallel.mesh import Mesh
from models.tensors.init import initial_value, initialise, student_rule
from models.tensors.inventory import mim_shapes, vision_shapes
from models.tensors.naming import LogicalTensor, logical_tensors
from models.towers.mim import StudentTower
from tests.golden import TOLERANCE, deviation, deviations, load_tensors, model_of
from tests.models.students import (
    STUDENTS,
    TARGET_DIM,
    build_student,
    logical_parameters,
    masks,
    pictures,
    student_model,
    student_tensors,
)

TRUNCATED_STD = 0.539560
"""Standard deviation of a standard normal cut off at one std on both sides."""


def gradients_of(tower: StudentTower, mesh: Mesh) -> dict[str, torch.Tensor]:
    named = list(logical_parameters(tower, mesh))
    found = {tensor.name: parameter.grad for tensor, parameter in named if parameter.grad is not None}
    assert len(found) == len(named)
    return found


@pytest.mark.parametrize("student", STUDENTS)
def test_predictions_loss_and_every_gradient(student: str, mesh: Mesh) -> None:
    io, tower = load_tensors("g8-mim/io"), build_student(student, mesh)
    predictions = tower(pictures(), masks(), samples=8)
    assert deviation(predictions, io[f"{student}.pred"]) < TOLERANCE
    loss = distillation_loss(predictions, io["targets"], torch.tensor(len(io["targets"])))
    torch.testing.assert_close(loss, io[f"{student}.loss"], rtol=1e-5, atol=0)
    loss.backward()
    gradients = gradients_of(tower, mesh)
    assert not deviations(gradients, student_tensors(student, "grads"))


def test_a_slowed_patch_projection_has_the_same_values(mesh: Mesh) -> None:
    model, weights = student_model("style8b"), student_tensors("style8b", "weights")
    outputs, gradients = [], []
    for scale in (1.0, 0.1):
        tower = StudentTower(model, target_dim=TARGET_DIM, patch_gradient_scale=scale, groups=mesh.vision_groups())
        with torch.no_grad():
            for tensor, parameter in logical_parameters(tower, mesh):
                parameter.copy_(weights[tensor.name])
        outputs.append(tower(pictures(), masks(), samples=8))
        outputs[-1].square().sum().backward()
        gradients.append(gradients_of(tower, mesh))
    assert outputs[0].equal(outputs[1])
    for name, full in gradients[0].items():
        slowed = name in ("vision.embed.weight", "vision.embed.bias")
        torch.testing.assert_close(gradients[1][name], 0.1 * full if slowed else full)


def test_pixels_of_masked_patches_reach_nothing(mesh: Mesh) -> None:
    tower, images = build_student("style18b", mesh), pictures().requires_grad_()
    tower(images, masks(), samples=8).square().sum().backward()
    assert images.grad is not None
    seen = images.grad.unfold(2, 14, 14).unfold(3, 14, 14).abs().sum((1, 4, 5)).flatten(1)  # [8, 16]
    assert (seen > 0).equal(~masks())


def test_the_order_of_predictions_is_sample_by_sample(mesh: Mesh) -> None:
    tower, images, masked = build_student("style8b", mesh), pictures(), masks()
    masked[2] = False
    one_by_one = [tower(images[i : i + 1], masked[i : i + 1], samples=1) for i in range(8)]
    assert [len(p) for p in one_by_one] == masked.sum(1).tolist()
    torch.testing.assert_close(tower(images, masked, samples=8), torch.cat(one_by_one), rtol=1e-4, atol=1e-5)


def test_a_mask_of_another_shape_is_refused(mesh: Mesh) -> None:
    tower = build_student("style18b", mesh)
    with pytest.raises(ValueError, match=r"shape \[8, 17\] for 8 images of 16 patches: it must be \[8, 16\]"):
        tower(pictures(), torch.zeros(8, 17, dtype=torch.bool), samples=8)


@pytest.mark.parametrize("student", STUDENTS)
def test_the_inventory_has_every_tensor_of_the_tower(student: str, mesh: Mesh) -> None:
    model = student_model(student)
    built = {tensor.name: tensor.shape for tensor, _ in logical_parameters(build_student(student, mesh), mesh)}
    assert vision_shapes(model, head=False) | mim_shapes(model, TARGET_DIM) == built


def test_the_mask_token_is_decayed_and_belongs_to_the_first_layer() -> None:
    model, optim = student_model("style18b"), OptimConfig(weight_decay=0.05, layer_decay_vision=0.5)
    group = {name: tensor_group(name, dims, model, optim) for name, dims in (
        ("vision.embed.mask_token", 1), ("vision.embed.cls_token", 1),
        ("vision.head.prediction.weight", 2), ("vision.head.prediction.bias", 1),
    )}  # fmt: skip
    decays = [g.weight_decay for g in group.values()]
    assert decays == [0.05, 0.0, 0.05, 0.0]
    assert [g.lr_scale for g in group.values()] == [0.5**3, 0.5**3, 1.0, 1.0]


# --- fresh weights ---------------------------------------------------------------------------------------------------


def fresh(fixture: str) -> dict[str, Tensor]:
    """Fresh weights of a student with the trunk of an architecture."""
    model = model_of(fixture)
    shapes = vision_shapes(model, head=False) | mim_shapes(model, 48)
    return {n: initial_value(LogicalTensor(n, s, None), model, 3, student_rule) for n, s in shapes.items()}


@pytest.mark.parametrize("fixture", ["tiny-18b", "tiny-8b", "tiny-eva02-B"])
def test_constants_of_a_fresh_student(fixture: str) -> None:
    post_norm = model_of(fixture).vision.post_norm
    for name, value in fresh(fixture).items():
        leaf = name.split(".")
        if "bias" in leaf:
            assert not value.any(), name
        elif leaf[-2] in ("norm1", "norm2"):
            assert value.equal(torch.full_like(value, 0.0 if post_norm else 1.0)), name
        elif leaf[-2] == "norm":
            assert value.equal(torch.ones_like(value)), name


@pytest.mark.parametrize("fixture", ["tiny-18b", "tiny-8b", "tiny-eva02-B"])
def test_spread_of_a_fresh_student(fixture: str) -> None:
    drawn = {n: v for n, v in fresh(fixture).items() if "norm" not in n and "bias" not in n.split(".")}
    assert {"vision.embed.mask_token", "vision.embed.weight", "vision.head.prediction.weight"} < drawn.keys()
    for name, value in drawn.items():
        bound = 0.015
        if name.endswith(("attn.proj.weight", "mlp.fc2.weight", "mlp.down.weight")):
            bound /= math.sqrt(2 * (1 + int(name.split(".")[2])))
        assert value.abs().max() <= bound, name
        # Flatter than a normal, so its standard error is smaller: five sigmas are generous.
        error = TRUNCATED_STD * bound / math.sqrt(2 * value.numel())
        assert abs(float(value.std()) - TRUNCATED_STD * bound) < 5 * error, name
        assert abs(float(value.mean())) < 5 * TRUNCATED_STD * bound / math.sqrt(value.numel()), name


def test_every_block_of_a_fresh_post_norm_student_is_the_identity(mesh: Mesh) -> None:
    model = student_model("style18b")
    tower = StudentTower(model, target_dim=TARGET_DIM, groups=mesh.vision_groups())
    initialise(tower, logical_tensors(tower, "vision", 0, 1), model, 0, 0, 1, student_rule)
    hidden = tower.embed(pictures(), masks())
    assert hidden.std() > 0
    assert tower.run_blocks(hidden, tower._tokens(8, None, hidden.device)).equal(hidden)
