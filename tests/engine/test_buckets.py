"""Buckets: no large tower is one, however many ranks there are; whoever reads new weights waits for their gather."""

import pytest
import torch
from torch import nn

from engine.config.phases import first_phase
from engine.config.read import Config, resolve
from engine.parallel.device import prepare
from engine.parallel.mesh import build_mesh
from engine.parallel.replicas import bucket_elements
from engine.trainer import Trainer
from tests.distributed import run_distributed, world
from tests.engine.mim_jobs import Layout, depth_of, mim_config, pictures_of_step
from tests.engine.test_layouts import random_pairs
from tests.golden import local_batch


@pytest.mark.parametrize(
    ("elements", "ranks", "expected"),
    [
        (695_000_000, 8, 40_000_000),
        (695_000_000, 360, 695_000_000 // 8),
        (695_000_000, 4608, 695_000_000 // 8),
        (2_200_000_000, 64, 64_000_000),
        (2_200_000_000, 576, 275_000_000),
        (100_000_000, 4608, 40_000_000),
    ],
)
def test_a_bucket_is_at_most_an_eighth_of_a_large_tower(elements: int, ranks: int, expected: int) -> None:
    with torch.device("meta"):
        module = nn.ParameterList([nn.Parameter(torch.empty(elements))])
    assert bucket_elements(module, ranks) == expected


SMALL = ("model.vision.depth=2", "model.text.depth=1", "train.global_batch_size=4", "train.micro_batch_size=2")
EVERY_TENSOR = ("parallel.bucket_size=1", "train.steps=5", "optim.warmup_steps=1")
"""A bucket for every tensor: one that nobody waits for is still under way when the next gather begins."""
TOWERS: dict[str, tuple[str, ...]] = {
    "fused, sigmoid": (
        "model.preset=tiny-18b",
        "model.block_kernels=fused",
        "train.loss=sigmoid",
        "train.logit_scale=null",
    ),
    "fused, swiglu": ("model.preset=tiny-b16", "model.block_kernels=fused"),
    "attention pool, scaled branches": (
        "model.preset=tiny-8b",
        "model.vision.post_norm=false",
        "model.vision.layer_scale=0.1",
        "model.vision.class_token=false",
        "model.vision.pool=attention",
    ),
}


def _train() -> list[list[float]]:
    """Losses of two steps of each."""
    torch.compiler.set_stance("force_eager")
    mesh, curves = build_mesh(1, 1, world()), []
    for options in TOWERS.values():
        config = resolve({"data": {"shards": ["-"]}}, [*options, *SMALL, *EVERY_TENSOR])
        trainer = _trainer(config, mesh)
        curves.append([float(trainer.step(local_batch(*random_pairs(config, i), mesh)).loss) for i in range(2)])
    config = mim_config(Layout(data=2, micro_batch=2, batch=4), *EVERY_TENSOR, model=depth_of(2))
    trainer = _trainer(config, mesh)
    curves.append([float(trainer.step(pictures_of_step(config, mesh, 4 * i)).loss) for i in range(2)])
    return curves


def _trainer(config: Config, mesh) -> Trainer:
    return Trainer(first_phase(config), mesh, prepare())


@pytest.mark.dist
def test_whoever_reads_new_weights_waits_for_their_gather() -> None:
    first, second = run_distributed(_train, 2)
    assert first == second and all(after != before for before, after in first)
