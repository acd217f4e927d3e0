"""Embeddings from a checkpoint path and a layout: what tools.embed and tools.evaluate share."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from data.sources import shards_of
from engine.build import DTYPES
from engine.checkpoint.format.folders import resolve_checkpoint
from engine.checkpoint.format.manifest import AVERAGE, WEIGHT
from engine.checkpoint.reader import Checkpoint
from engine.config.read import Config
from engine.evaluation.embedder import Embedder, inference_config, load_encoders, verify_together
from engine.evaluation.inputs import READERS, ShardInput
from engine.evaluation.vocabulary import remark_on
from engine.parallel.launch import job
from engine.parallel.mesh import Mesh

_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)+=.*", re.DOTALL)


@dataclass(frozen=True)
class Session:
    """A checkpoint, the layout to run it at and this rank's place in it."""

    config: Config
    mesh: Mesh
    device: torch.device
    checkpoint: Checkpoint

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of pixels and weights."""
        return DTYPES[self.config.train.precision]

    @property
    def is_first(self) -> bool:
        """Whether this rank prints and writes."""
        return self.mesh.world.rank == 0


def split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """(arguments, `dotted.key=value` overrides)."""
    overrides = [a for a in argv if _OVERRIDE.fullmatch(a)]
    return [a for a in argv if a not in overrides], overrides


@contextmanager
def open_session(path: Path, overrides: list[str], micro_batch: int) -> Iterator[Session]:
    """Checkpoint, config and mesh; the towers are loaded by `load` when the input is known. Collective."""
    checkpoint = Checkpoint(resolve_checkpoint(path))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config = inference_config(checkpoint.manifest, overrides, world_size, micro_batch)
    with job(config.parallel) as (mesh, device):
        yield Session(config, mesh, device.torch_device, checkpoint)
    checkpoint.close()


def load(
    session: Session, *, images: bool, texts: bool, verify_hashes: bool, ema: bool = False, encodes: bool = True
) -> Embedder:
    """The towers that the input needs. Collective over the mesh; raises CheckpointError.

    ema: averaged weights. encodes: texts will be tokenized, so a tokenizer that does not fit is said.
    """
    verify_together(session.checkpoint, session.mesh, verify_hashes)
    encoders, remarks = load_encoders(
        session.checkpoint,
        session.config,
        session.mesh,
        session.device,
        images=images,
        texts=texts,
        kind=AVERAGE if ema else WEIGHT,
    )
    if session.is_first:
        for remark in [*remarks, *filter(None, [remark_on(session.config.model.text) if texts and encodes else ""])]:
            print(remark, file=sys.stderr, flush=True)
    config = session.config
    return Embedder(encoders, session.mesh, session.device, config.train.micro_batch_size, config.data.frames)


def shard_input(shards: list[str], session: Session, readers: int = READERS) -> ShardInput:
    """Tar shards as input of the session's model; data.frames=… of the overrides reads clips."""
    frames = session.config.data.frames
    with shards_of("SHARDS"):
        return ShardInput(
            shards, session.config, session.mesh, session.dtype, session.device, frames=frames, readers=readers
        )


def block_size(session: Session) -> int:
    """Samples of one block: enough micro-batches for every replica to fill the pipeline."""
    mesh = session.mesh
    return session.config.train.micro_batch_size * mesh.data.size * 4 * mesh.pipeline.size
