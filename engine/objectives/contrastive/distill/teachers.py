"""Frozen CLIPs on this rank: whole towers, which embed the pairs that the rank owns.

A replica's ranks share its pairs among themselves, as around the teacher of masked-feature distillation: teaching costs
each of them 1 / (TP x PP) of the local batch, and no collective but the dealing of the pixels. A teacher sees whole
pictures, without patch dropout, at its own size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.pixels.transforms import normalise
from engine.build import DTYPES
from engine.config.read import Config, TeacherConfig
from engine.feed import LocalBatch
from engine.objectives.contrastive.distill.losses import Taught
from engine.objectives.frozen import FrozenSource
from engine.parallel.device import moved
from engine.parallel.mesh import Mesh
from engine.parallel.rows import deal_from_first_stage
from models.clip import embedding
from models.towers.mim import resize_for_teacher
from models.towers.text import TextTower
from models.towers.vision import VisionTower


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """One frozen CLIP."""

    config: TeacherConfig
    vision: VisionTower
    text: TextTower

    @property
    def towers(self) -> tuple[nn.Module, nn.Module]:
        """Both of them."""
        return self.vision, self.text

    def images(self, pixels: Tensor) -> Tensor:
        """Pixels uint8 [n, frames, 3, h, w] of whole samples -> embeddings [n, E]."""
        dtype, samples = self.vision.config.params_dtype, pixels.flatten(0, 1)
        seen = resize_for_teacher(normalise(samples, dtype, self.vision.vision.pixel_norm), self.vision.vision)
        return embedding(self.vision(seen, None, samples=len(seen)), pixels.shape[1])

    def captions(self, tokens: Tensor) -> Tensor:
        """Ids int64 [n, context] on the host -> embeddings [n, E]."""
        device = self.text.token_embedding.device
        return embedding(self.text(moved(self.text.trimmed(tokens), device)))


def build_teachers(config: Config, mesh: Mesh, device: torch.device) -> list[Teacher]:
    """The towers of train.distill, frozen; their weights are not set."""
    built = []
    for teacher in config.train.distill:
        dtype, model = DTYPES[teacher.precision or config.train.precision], teacher.model
        assert model is not None, "the config was not resolved"
        with torch.device(device):  # groups of this rank alone
            vision = VisionTower(model, groups=mesh.text_groups(), dtype=dtype)
            text = TextTower(model, groups=mesh.text_groups(), dtype=dtype)
        built.append(
            Teacher(config=teacher, vision=vision.requires_grad_(False).eval(), text=text.requires_grad_(False).eval())
        )
    return built


def load_teachers(config: Config, mesh: Mesh, device: torch.device) -> tuple[list[Teacher], list[str]]:
    """The same with their weights, and remarks for people. Every rank reads all of them; no collective.

    Raises CheckpointError: no CLIP of the model that train.distill says.
    """
    teachers, remarks = build_teachers(config, mesh, device), []
    for number, teacher in enumerate(teachers):
        key, model = f"train.distill[{number}]", teacher.config.model
        assert model is not None
        source = FrozenSource(path=teacher.config.path, model=model, key=f"{key}.path", model_key=f"{key}.model")
        for part, tower in zip(("vision", "text"), teacher.towers, strict=True):
            remarks += source.load(tower, part, config, mesh)
    return teachers, remarks


class Teaching:
    """What the teachers of a job say of each batch."""

    def __init__(self, teachers: Sequence[Teacher], config: Config, mesh: Mesh, device: torch.device):
        self.teachers, self.mesh, self.device = teachers, mesh, device
        self.frames, self.side = config.data.frames, config.model.vision.image_size
        self.samples = config.micro_batch_samples
        """Samples of one pass."""
        self.local_batch = config.train.global_batch_size // mesh.data.size
        self.batch: LocalBatch | None = None
        self._pixels: Tensor | None = None
        self.taught: list[Taught] = []
        """Embeddings of this rank's pairs, once they are there."""

    def deal(self) -> None:
        """Every rank of the replica gets the pixels of its own pairs. Collective over the pipeline."""
        assert self.batch is not None
        shape = (3, self.side, self.side) if self.frames == 1 else (self.frames, 3, self.side, self.side)
        dealt = deal_from_first_stage(self.batch.images, self.local_batch, shape, self.mesh, self.device)
        self._pixels = dealt.view(len(dealt), self.frames, *shape[-3:])

    @torch.no_grad()
    def teach(self) -> None:
        """Embed this rank's pairs."""
        assert self.batch is not None and self._pixels is not None
        pixels, tokens = self._pixels, self.batch.tokens
        self.taught = [
            Taught(
                teacher=teacher.config,
                image=torch.cat([teacher.images(pixels[rows]) for rows in self._parts(len(pixels))]),
                text=torch.cat([teacher.captions(tokens[rows]) for rows in self._parts(len(tokens))]),
            )
            for teacher in self.teachers
        ]
        self._pixels = None

    def _parts(self, rows: int) -> Iterator[slice]:
        """Never none: every rank owns a pair (engine/config/layout.py)."""
        for start in range(0, rows, self.samples):
            yield slice(start, min(start + self.samples, rows))
