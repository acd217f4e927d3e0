"""What the planner charges for kernels between products, against operators counted on a block of fake tensors."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.operators import count_block
from engine.config.read import preset_model
from engine.parallel.device import prepare
from engine.parallel.mesh import Mesh, build_mesh
from tests.distributed import world
from tools.cost.kernels import Kernels, elementwise_bytes

ATTENTION = 4, 8
"""Its own reads and writes, in elements a token and channel, which are charged here and not counted there."""


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
    counted = count_block(model, mesh).per_channel()
    moved = elementwise_bytes(model.vision, 1, 1, element=2, kernels=Kernels(elementwise=charged))
    ours = [
        each / model.vision.width - 2 * attention
        for each, attention in zip((moved.forward, moved.backward), ATTENTION, strict=True)
    ]
    assert ours == pytest.approx(counted, rel=0.03)
