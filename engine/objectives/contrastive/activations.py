"""What a contrastive step keeps for its backward on this rank, measured by forwards of made-up batches; and so k."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from engine.build import DTYPES, Towers
from engine.config.read import Config
from engine.feed import LocalBatch
from engine.objectives.contrastive.program import ContrastiveProgram
from engine.objectives.contrastive.towers import VisionRunner
from engine.parallel.mesh import Mesh
from engine.pipeline.memory import keep_within, saved_bytes
from engine.pipeline.program import Unit
from models.clip import embedding
from models.tensors.products import fast_products


def message_shape(config: Config, mesh: Mesh) -> tuple[int, int, int]:
    """Tokens that travel between stages: this rank's of a micro-batch, packed."""
    train, vision = config.train, config.model.vision
    tokens = train.micro_batch_size * vision.kept_tokens(train.patch_dropout)
    return tokens // (mesh.tensor.size if config.parallel.sequence else 1), 1, vision.width


class Activations:
    """Measures the chunks and the captions of a rank. Collective over the tensor axis, and over the owners of the
    weights where they are sharded.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        device: torch.device,
        towers: Towers,
        vision: Sequence[VisionRunner],
        text_rows: Sequence[slice],
        program: ContrastiveProgram,
    ):
        """vision: one a chunk. text_rows: this rank's captions, in parts for the tower. program: whatever its k."""
        self.config, self.mesh, self.device, self.towers = config, mesh, device, towers
        self.vision, self.text_rows = vision, text_rows
        self.program = program

    def kept_micro_batches(self, micro_batches: int) -> int:
        """k: train.keep_activations (-1: all), or what train.activation_budget_gb holds on this rank."""
        train = self.config.train
        if train.activation_budget_gb is None:
            return train.keep_activations
        budget = train.activation_budget_gb
        with fast_products(self.device, DTYPES[train.precision]):
            one = self.micro_batch_bytes()
            captions = self.caption_bytes()  # every rank asks: where weights are sharded all gather them
        keep = keep_within(budget, one, micro_batches)
        if keep == micro_batches and keep * one + captions > budget * 1e9:
            keep -= 1  # where all micro-batches keep theirs, the captions do, too
        # A replay runs the stage's collectives again, so the ranks of a tensor group have to agree.
        agreed = torch.tensor([keep], device=self.device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=self.mesh.tensor.group)
        return int(agreed)

    def micro_batch_bytes(self) -> int:
        """Bytes that one micro-batch keeps for its backward, in all chunks of this rank."""
        total = 0
        stage = self.mesh.pipeline.rank
        for number, (runner, part) in enumerate(zip(self.vision, self.towers.parts, strict=False)):
            unit = Unit(number, 0)
            if self.program.trains(stage, unit):  # the others keep nothing
                with part.whole_weights():
                    total += self._chunk_bytes(runner, self.program.returns_gradient(stage, unit))
        return total

    def caption_bytes(self) -> int:
        """Bytes that all captions of this rank keep at full context."""
        tower, text = self.towers.text_side.tower, self.config.model.text

        def encode(count: int) -> Tensor:
            return embedding(tower(torch.zeros(count, text.context_length, dtype=torch.int64, device=self.device)))

        weights = list(tower.parameters())
        with self.towers.parts[-1].whole_weights():
            return sum(saved_bytes(partial(encode, rows.stop - rows.start), weights) for rows in self.text_rows)

    def _chunk_bytes(self, runner: VisionRunner, returns_gradient: bool) -> int:
        side, samples = self.config.model.vision.image_size, self.config.micro_batch_samples
        runner.batch = LocalBatch(
            positions=np.arange(samples),
            images=torch.zeros(samples, runner.frames, 3, side, side, dtype=torch.uint8),
            tokens=torch.empty(0),
        )
        hidden = None
        if not runner.tower.is_first:
            hidden = torch.zeros(
                message_shape(self.config, self.mesh), dtype=runner.tower.config.params_dtype, device=self.device
            )
        if runner.tower.is_divided:
            with torch.no_grad():
                hidden = runner.below(hidden, 0)
        if hidden is not None:
            hidden.requires_grad_(returns_gradient)
        return saved_bytes(lambda: runner(hidden, 0), list(runner.tower.parameters()))
