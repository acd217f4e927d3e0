"""The frozen tower that teaches: a whole one on every rank, outside the gradient buffers and the optimizer.

A replica's ranks share its images among themselves, so that teaching costs each of them 1 / (TP x PP) of the local
batch, without one collective inside the tower.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from data.pixels.transforms import normalise
from engine.build import DTYPES
from engine.config.read import Config
from engine.objectives.frozen import FrozenSource
from engine.parallel.mesh import Mesh
from models.config import ModelConfig
from models.towers.mim import resize_for_teacher, teacher_features
from models.towers.vision import VisionTower


def teacher_model(config: Config) -> ModelConfig:
    """The teacher's model, of a config with objective=mim."""
    assert config.mim.teacher_model is not None, "the config was not resolved"
    return config.mim.teacher_model


def load_teacher(config: Config, mesh: Mesh, device: torch.device) -> tuple[VisionTower, list[str]]:
    """The tower that mim.teacher holds, frozen, and remarks for people. Every rank reads all of it; no collective.

    Raises CheckpointError: no CLIP image tower of mim.teacher_model.
    """
    tower, path = teacher_tower(config, mesh, device), str(config.mim.teacher)
    source = FrozenSource(path=path, model=teacher_model(config), key="mim.teacher", model_key="mim.teacher_model")
    return tower, source.load(tower, "vision", config, mesh)


def teacher_tower(config: Config, mesh: Mesh, device: torch.device) -> VisionTower:
    """A frozen tower of mim.teacher_model, its weights not set."""
    dtype = DTYPES[config.mim.teacher_precision or config.train.precision]
    with torch.device(device):
        tower = VisionTower(teacher_model(config), groups=mesh.text_groups(), dtype=dtype)  # groups of this rank alone
    return tower.requires_grad_(False).eval()


class Teacher:
    """Shows its features of masked patches."""

    def __init__(self, tower: VisionTower, *, width: int, micro_batch: int):
        """width: D of its features. micro_batch: images of one pass."""
        self.tower, self.width, self.micro_batch = tower, width, micro_batch

    def targets(self, images: Tensor, masked: Tensor) -> Tensor:
        """Pixels uint8 [R, 3, h, w], bool [R, n] on the CPU -> features [N, D] of the N masked patches, no graph.

        The whole picture is seen: only what is looked up is masked. Images are resized to the teacher's size.
        """
        device = images.device
        found = [torch.empty(0, self.width, dtype=self.tower.config.params_dtype, device=device)]
        for rows in self._parts(images):
            found.append(self._features(images[rows]).flatten(0, 1)[_places(masked[rows], device)])
        return torch.cat(found)

    def _parts(self, images: Tensor) -> Iterator[slice]:
        for start in range(0, len(images), self.micro_batch):
            yield slice(start, start + self.micro_batch)

    def _features(self, pixels: Tensor) -> Tensor:
        dtype = self.tower.config.params_dtype
        seen = normalise(pixels, dtype, self.tower.vision.pixel_norm)
        return teacher_features(self.tower, resize_for_teacher(seen, self.tower.vision))


def _places(masked: Tensor, device: torch.device) -> Tensor:
    """Numbers of the true entries, found where the mask lies, so that nothing waits for the device."""
    return masked.flatten().nonzero().squeeze(1).to(device, non_blocking=True)
