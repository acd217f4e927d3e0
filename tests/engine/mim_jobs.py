"""Small jobs of masked-feature distillation: the fixture's teacher, students at any layout, batches from a seed."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from engine.config.read import Config, resolve
from engine.feed import LocalBatch
from engine.parallel.mesh import Mesh
from models.config import ModelConfig, VisionConfig
from tests.golden import FOLDER, local_batch

TEACHER = {"teacher": str(FOLDER / "tiny-bigE" / "weights.safetensors"), "teacher_model": "tiny-e14"}
MODEL = ModelConfig(
    embed_dim=32,
    vision=VisionConfig(
        image_size=56, patch_size=14, depth=4, width=32, head_width=4, mlp_hidden=80, norm="rms", post_norm=True
    ),
)
"""The 18B's switches: post-norm, RMSNorm, no biases at q and v; a head for each of 8 tensor ranks."""


@dataclass(frozen=True)
class Layout:
    """Where a job runs; `options` are settings that must not show in the curve."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    micro_batch: int = 16
    batch: int = 16
    depth: int = 4
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        name = f"tp{self.tensor}-pp{self.pipeline}-dp{self.data}-mb{self.micro_batch}-b{self.batch}"
        return "-".join([name, *(option.split(".")[-1] for option in self.options)])

    @property
    def ranks(self) -> int:
        """W."""
        return self.tensor * self.pipeline * self.data

    @property
    def alone(self) -> "Layout":
        """The same batch on one process, at once."""
        return Layout(micro_batch=self.batch, batch=self.batch, depth=self.depth)

    def settings(self) -> list[str]:
        """As overrides."""
        return [
            f"parallel.tensor={self.tensor}",
            f"parallel.pipeline={self.pipeline}",
            f"train.micro_batch_size={self.micro_batch}",
            f"train.global_batch_size={self.batch}",
            *self.options,
        ]


def mim_config(layout: Layout, *overrides: str, model: ModelConfig = MODEL, **mim: Any) -> Config:
    """A job of five AdamW steps."""
    tree = {
        "objective": "mim",
        "model": asdict(model),
        "mim": TEACHER | {"masked_patches": 10, "min_block": 8} | mim,
        "data": {"shards": ["-"]},
        "train": {"steps": 5},
        "optim": {
            "name": "adamw",
            "lr_vision": 2e-3,
            "warmup_steps": 2,
            "min_lr_ratio": 0.1,
            "weight_decay": 0.05,
            "layer_decay_vision": 1.0,
            "clip_grad_norm": 0.9,  # within the norms of these steps
        },
    }
    return resolve(tree, [*layout.settings(), *overrides])


def depth_of(depth: int) -> ModelConfig:
    """MODEL with another number of blocks."""
    return ModelConfig(embed_dim=32, vision=VisionConfig(**asdict(MODEL.vision) | {"depth": depth}))


def pictures_of_step(config: Config, mesh: Mesh, start_position: int) -> LocalBatch:
    """This rank's part of a batch that follows from its place in the run."""
    draw = torch.Generator().manual_seed(1000 + start_position)
    side = config.model.vision.image_size
    images = torch.randint(0, 256, (config.train.global_batch_size, 3, side, side), dtype=torch.uint8, generator=draw)
    return without_captions(images, mesh, start_position)


def without_captions(images: Tensor, mesh: Mesh, start_position: int = 0) -> LocalBatch:
    """This rank's part of a global batch uint8 [B, 3, h, w]."""
    return local_batch(images, torch.empty(len(images), 0, dtype=torch.int64), mesh, start_position)
