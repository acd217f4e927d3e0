"""Clips in a training step: the mean of the frames' features, and the one-process curve at every layout."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.order.stateless import kept_patches
from data.pixels.transforms import normalise
from engine.config.phases import first_phase
from engine.config.read import Config, ConfigError, ParallelConfig, check_layout, resolve
from engine.parallel.device import prepare
from engine.parallel.launch import job
from engine.parallel.mesh import Mesh, build_mesh
from engine.trainer import Trainer
from tests.distributed import run_distributed, world
from tests.engine.test_layouts import LOSS_TOLERANCE, WEIGHT_TOLERANCE, random_pairs
from tests.gather import backward_only, contrastive_step, whole_gradients, whole_weights
from tests.golden import TOLERANCE, deviations, local_batch

pytestmark = pytest.mark.dist

BATCH, FRAMES, STEPS, SCALE = 8, 2, 2, 20.0
ALONE = ("train.micro_batch_size=16",)
LAYOUTS = {
    "tp2-pp2": ("parallel.tensor=2", "parallel.pipeline=2", "train.micro_batch_size=4", "train.keep_activations=1"),
    "pp2-dp2-virtual": ("parallel.pipeline=2", "parallel.virtual=2", "train.micro_batch_size=2"),
    "tp2-dp2": ("parallel.tensor=2", "train.micro_batch_size=4", "train.keep_activations=-1"),
    "dp4": ("train.micro_batch_size=2", "train.activation_budget_gb=1"),
}


def config_of(*overrides: str) -> Config:
    tree = {
        "model": "tiny-18b",
        "data": {"shards": ["-"], "frames": FRAMES},
        "train": {"global_batch_size": BATCH, "patch_dropout": 0.5, "logit_scale": SCALE, "steps": STEPS + 1},
        "optim": {"lr_vision": 0.01, "lr_text": 0.01, "warmup_steps": 2},
    }
    return resolve(tree, ["model.text.depth=2", *overrides])


def random_clips(config: Config, step: int) -> tuple[Tensor, Tensor]:
    """uint8 [B, frames, 3, h, w] and captions."""
    images, tokens = random_pairs(config, step)
    noise = torch.Generator().manual_seed(99 + step)
    shape = (BATCH, FRAMES, *images.shape[1:])
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=noise), tokens


def run(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Losses of a few steps, and the weights after them on rank 0."""
    check_layout(config, mesh.world.size)
    trainer = Trainer(first_phase(config), mesh, prepare())
    losses = []
    for step in range(STEPS):
        batch = local_batch(*random_clips(config, step), mesh, start_position=step * BATCH)
        losses.append(float(trainer.step(batch).loss))
    return {"losses": losses, "weights": whole_weights(trainer)}


def run_layouts() -> list[dict[str, Any]]:
    configs = [config_of(*options) for options in LAYOUTS.values()]
    return [run(c, build_mesh(c.parallel.tensor, c.parallel.pipeline, world())) for c in configs]


def test_every_layout_gives_the_one_process_curve() -> None:
    with job(ParallelConfig()) as (mesh, _):
        expected = run(config_of(*ALONE), mesh)
    for rank, outcomes in enumerate(run_distributed(run_layouts, 4)):
        for name, found in zip(LAYOUTS, outcomes, strict=True):
            assert found["losses"] == pytest.approx(expected["losses"], rel=LOSS_TOLERANCE), (rank, name)
            if rank == 0:
                assert not deviations(found["weights"], expected["weights"], WEIGHT_TOLERANCE), name


def plain_loss(trainer: Trainer, clips: Tensor, tokens: Tensor) -> Tensor:
    """Frame by frame, with a matrix of all logits."""
    config, tower = trainer.config, trainer.towers.vision[0]
    keep = config.model.vision.kept_tokens(config.train.patch_dropout) - 1
    images = []
    for row, clip in enumerate(clips):
        kept = kept_patches(config.train.seed, torch.tensor([row]).numpy(), config.model.vision.patches, keep, FRAMES)
        frames = [
            tower(normalise(frame[None], torch.float32), torch.from_numpy(own[None]), samples=1)
            for frame, own in zip(clip, kept, strict=True)
        ]
        images.append(torch.cat(frames).mean(dim=0))
    image = F.normalize(torch.stack(images), dim=-1)
    text = F.normalize(trainer.towers.text_side.tower(tokens), dim=-1)
    logits, own = SCALE * image @ text.T, torch.arange(len(image))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def test_a_clip_is_the_mean_of_its_frames() -> None:
    with job(ParallelConfig()) as (mesh, _):
        trainer = Trainer(first_phase(config_of("train.micro_batch_size=4")), mesh, prepare())
        clips, tokens = random_clips(trainer.config, 0)
        trainer.towers.zero_gradients()
        loss = plain_loss(trainer, clips, tokens)
        loss.backward()
        expected = whole_gradients(trainer)
        result = backward_only(contrastive_step(trainer), local_batch(clips, tokens, mesh))
        assert float(result.loss) == pytest.approx(loss.item(), rel=1e-5)
        assert not deviations(whole_gradients(trainer), expected, TOLERANCE)


def test_frames_of_a_clip_lose_different_patches_and_stills_the_same_as_ever() -> None:
    positions = torch.arange(5).numpy()
    stills = kept_patches(0, positions, 16, 8)
    clips = kept_patches(0, positions, 16, 8, frames=3).reshape(5, 3, 8)
    assert (clips[:, 0] == stills).all()
    assert all((clips[:, a] != clips[:, b]).any(axis=1).all() for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("train.micro_batch_size=3",), "whole clips"),
        (("train.micro_batch_size=12",), r"DP 4 x train.micro_batch_size 12 / data.frames 2"),
        (("train.micro_batch_size=4", "train.keep_activations=2"), "exceeds the 1 micro-batches"),
    ],
)
def test_refused(overrides: tuple[str, ...], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check_layout(config_of(*overrides), 4)
