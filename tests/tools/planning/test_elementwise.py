"""What the planner charges for kernels between products, against operators counted on a block of fake tensors."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.operators import DROPOUT, count_block
from engine.config.read import preset_model
from engine.parallel.device import prepare
from engine.parallel.mesh import Mesh, build_mesh
from models.config import ModelConfig
from tests.distributed import world
from tools.cost.kernels import Kernels, elementwise_bytes

ATTENTION = 4, 8
"""Its own reads and writes, in elements a token and channel, which are charged here and not counted there."""
PRODUCTS = 2, 4
"""The same of products of scores, in elements a score."""


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """One rank."""
    prepare()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield build_mesh(1, 1, world())
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "name",
    [
        *("18b", "l14", "siglip2-b16", "dinov3-7b"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("e14-plus", "b16", "vit-l14", "internvit-6b")),
    ],
)
@pytest.mark.parametrize(("kernels", "charged"), [("torch", "eager"), ("fused", "fused")])
def test_the_charge_is_what_operators_move(name: str, kernels: str, charged: str, mesh: Mesh) -> None:
    model = replace(preset_model(name), block_kernels=kernels)
    check(model, Kernels(elementwise=charged), mesh)


@pytest.mark.parametrize("name", ["18b", pytest.param("b16", marks=pytest.mark.slow)])
def test_so_are_the_scores_of_an_attention_by_products(name: str, mesh: Mesh) -> None:
    model = replace(preset_model(name), block_kernels="fused", attention="matmul")
    check(model, Kernels(elementwise="fused", keeps_scores=True), mesh)


def check(model: ModelConfig, kernels: Kernels, mesh: Mesh) -> None:
    """Compare what a block moves forward and backward; what products read and write themselves is not counted."""
    vision = model.vision
    counted = count_block(model, mesh).per_channel()
    scores = kernels.keeps_scores * vision.heads * vision.kept_tokens(DROPOUT)
    moved = elementwise_bytes(vision, 1, 1, element=2, kernels=kernels, scores=scores)
    ours = [
        (each - 2 * attention * vision.width - 2 * products * scores) / vision.width
        for each, attention, products in zip((moved.forward, moved.backward), ATTENTION, PRODUCTS, strict=True)
    ]
    assert ours == pytest.approx(counted, rel=0.03)
