"""The image tower on a GPU against the authors' numbers, and every kernel against torch's. Never run so far.

The first test is the one to look at first: everything else compares with what it has checked.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.parallel.mesh import Mesh
from models.blocks.packages import APEX, FLASH_2, FLASH_3, FLASH_4, TRANSFORMER_ENGINE, Package
from models.config import FP8_MULTIPLES
from models.towers.vision import VisionTower
from tests.golden import ARCHITECTURES, TOLERANCE, deviation, deviations, load_io, model_of, pixels
from tests.gpu.needs import gpus
from tests.models import backend_cases as cases
from tests.models.conftest import mesh as mesh

pytestmark = pytest.mark.gpu

TE = cases.TE
KERNEL_TOLERANCE, BF16_TOLERANCE, FP8_TOLERANCE = 1e-2, 6e-2, 0.4
"""As in tests/models/test_backends.py."""
BF16_KERNELS: list[tuple[str, dict[str, Any], Package | None, tuple[int, int]]] = [
    ("flash", {"attention": "flash"}, FLASH_2, (8, 0)),
    ("flash3", {"attention": "flash3"}, FLASH_3, (9, 0)),
    ("flash4", {"attention": "flash4"}, FLASH_4, (9, 0)),
    ("te-linears", TE | {"attention": "sdpa", "norm_kernel": "torch"}, TRANSFORMER_ENGINE, (8, 0)),
    ("te", TE, TRANSFORMER_ENGINE, (9, 0)),
    ("apex", {"norm_kernel": "apex"}, APEX, (8, 0)),
    ("compiled", {"norm_kernel": "compiled"}, None, (8, 0)),
    ("fused", {"block_kernels": "fused"}, None, (8, 0)),
]
FP8_CAPABILITY = {"current": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
WIDE: dict[str, Any] = {"width": 1024, "head_width": 128, "mlp_hidden": 5120, "depth": 4}
"""Sizes whose GEMMs fp8 takes: multiples of 128."""


@gpus(1)
@pytest.mark.parametrize("fixture", ARCHITECTURES)
def test_a_gpu_gives_the_authors_numbers_in_fp32(fixture: str, mesh: Mesh) -> None:
    with torch.device("cuda"):
        tower = cases.build(fixture, {}, mesh)
    got = tower(pixels(fixture).cuda(), None, samples=8)
    assert deviation(got.cpu(), load_io(fixture)["image_features"]) < TOLERANCE


def _passes(choice: dict[str, Any], mesh: Mesh, fixture: str) -> dict[str, torch.Tensor]:
    with torch.device("cuda"):
        tower = cases.build(fixture, choice, mesh, dtype=torch.bfloat16)
    features = tower(pixels(fixture).cuda(), None, samples=8)
    values = cases.attention_alone(tower, "cuda") | {"features": features.detach()}
    return {name: value.cpu() for name, value in values.items()}


@pytest.mark.parametrize(
    ("choice", "fixture"),
    [
        pytest.param(
            choice, fixture, marks=gpus(1, *filter(None, [package]), capability=capability), id=f"{name}-{fixture}"
        )
        for name, choice, package, capability in BF16_KERNELS
        for fixture in ARCHITECTURES
        # Flash kernels take head widths in multiples of 8; the other fixtures have 12 and 14.
        if model_of(fixture).vision.head_width % 8 == 0
        and (choice.get("norm_kernel") not in ("apex", "compiled") or model_of(fixture).vision.norm == "rms")
    ],
)
def test_a_kernel_agrees_with_torch_in_bf16(choice: dict[str, Any], fixture: str, mesh: Mesh) -> None:
    values, reference = _passes(choice, mesh, fixture), _passes({"block_kernels": "torch"}, mesh, fixture)
    assert deviation(values.pop("features"), reference.pop("features")) < BF16_TOLERANCE
    worst = deviations(values, reference, limit=KERNEL_TOLERANCE)
    assert not worst, worst


@gpus(1, TRANSFORMER_ENGINE)
def test_the_names_and_shapes_of_a_checkpoint_know_of_no_backend(mesh: Mesh) -> None:
    assert cases.shipped_names(mesh, TE | {"attention": "sdpa"}) == cases.shipped_names(mesh, {})


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(recipe, marks=gpus(1, TRANSFORMER_ENGINE, capability=FP8_CAPABILITY[recipe]))
        for recipe in FP8_MULTIPLES
    ],
)
def test_fp8_is_near_bf16_and_a_replay_repeats_it(recipe: str, mesh: Mesh) -> None:
    samples = 32
    towers = {name: _wide_tower({"fp8": name}, mesh) for name in ("none", recipe)}
    weights = dict(towers["none"].named_parameters())
    with torch.no_grad():
        for name, parameter in towers[recipe].named_parameters():
            parameter.copy_(weights[name])
    images = torch.randn(samples, 3, 56, 56, device="cuda")
    kept = torch.arange(15, device="cuda").expand(samples, 15)  # 16 tokens each
    reference = towers["none"](images, kept, samples=samples)
    with torch.no_grad():
        encoded = towers[recipe](images, kept, samples=samples)
    replayed = towers[recipe](images, kept, samples=samples)
    assert torch.equal(encoded, replayed)
    assert 0 < deviation(encoded.cpu(), reference.detach().cpu()) < FP8_TOLERANCE


def _wide_tower(choice: dict[str, Any], mesh: Mesh) -> VisionTower:
    model = cases.kernels(model_of("tiny-18b"), TE | choice)
    model = replace(model, vision=replace(model.vision, **WIDE))
    with torch.device("cuda"):
        tower = VisionTower(model, groups=mesh.vision_groups(), dtype=torch.bfloat16)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.normal_(std=0.02)
    return tower
