"""What a suite is run on, and how."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config.read import Config
from engine.evaluation.embedder import Embedder
from engine.evaluation.inputs import READERS
from engine.parallel.mesh import Mesh
from models.towers.heads import Read


@dataclass(frozen=True, kw_only=True)
class Towers:
    """The model that is evaluated."""

    config: Config
    mesh: Mesh
    dtype: torch.dtype
    device: torch.device
    embedder: Callable[[int], Embedder]
    """For clips of so many frames (1: pictures)."""

    def block_size(self, embedder: Embedder, read: Read = "features") -> int:
        """Samples of one block: enough micro-batches for every replica to fill the pipeline; of tokens, which are
        hundreds a picture, one.
        """
        units = max(1, embedder.micro_batch // embedder.frames) * self.mesh.data.size
        return units if read == "tokens" else units * 4 * self.mesh.pipeline.size


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a suite is run."""

    root: Path
    transforms: tuple[str, ...] = ("squash",)
    frames: tuple[int, ...] = (1,)
    """Frames of clips; pictures are pictures."""
    any_size: bool = False
    readers: int = READERS
    probes: tuple[str, ...] = ()
    """linear, sgd, knn, attentive."""
    probe_features: Read = "pooled"
    """What linear, sgd and knn are fitted on: pooled (before the projection), or features (the embeddings)."""
    keep_features: bool = False
