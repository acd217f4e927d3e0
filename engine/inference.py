"""Embeddings of images and captions at any layout, without gradients: evaluation and feature extraction.

Images are dealt over the data axis and run through the stages in micro-batches; captions are dealt over all ranks.
Every rank gets all embeddings, in input order.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from engine.build import Towers
from engine.mesh import Mesh
from engine.p2p import StageLink
from engine.rows import gather_rows, split_rows
from models.clip import embedding
from models.text import trim_padding

Pixels = Callable[[slice], Tensor]
"""rows of the input -> normalised images [rows, 3, h, w]; asked for on the first stage only."""


class Embedder:
    """Runs both towers forward. Collective over the mesh."""

    def __init__(self, towers: Towers, mesh: Mesh, device: torch.device, micro_batch: int):
        """micro_batch: images of one pass; a multiple of the tensor axis under sequence parallelism."""
        self.towers, self.mesh, self.device, self.micro_batch = towers, mesh, device, micro_batch
        vision = towers.vision
        tokens = micro_batch * (1 + vision.vision.patches)
        split = mesh.tensor.size if vision.config.sequence_parallel else 1
        shape, dtype = (tokens // split, 1, vision.vision.width), vision.config.params_dtype
        link = lambda neighbour: StageLink(mesh.pipeline, neighbour, shape, dtype, device)  # noqa: E731
        self.previous = None if mesh.is_first_stage else link(mesh.pipeline.rank - 1)
        self.next = None if mesh.is_last_stage else link(mesh.pipeline.rank + 1)

    @torch.no_grad()
    def images(self, pixels: Pixels, count: int) -> Tensor:
        """Embeddings fp32 [count, D] of `count` images."""
        mine = split_rows(count, self.mesh.data.size)[self.mesh.data.rank]
        width = self.towers.text.projection.out_features
        outputs = [self._micro_batch(pixels, rows) for rows in _blocks(mine, self.micro_batch)]
        if self.next:
            self.next.drain()
        own = torch.cat([out for out in outputs if out is not None]) if outputs and outputs[0] is not None else None
        if own is None:
            own = torch.empty(mine.stop - mine.start, width, device=self.device)
        if self.mesh.pipeline.size > 1:
            last = dist.get_global_rank(self.mesh.pipeline.group, self.mesh.pipeline.size - 1)
            dist.broadcast(own, src=last, group=self.mesh.pipeline.group)
        return gather_rows(own, count, self.mesh.data)

    def _micro_batch(self, pixels: Pixels, rows: slice) -> Tensor | None:
        """One pass; the last block is filled up, so that every message has the same shape."""
        count = rows.stop - rows.start
        if self.previous:
            self.previous.post_receive()
            inputs = self.previous.receive()
        else:
            images = pixels(rows).to(self.device)
            inputs = images.new_zeros(self.micro_batch, *images.shape[1:])
            inputs[:count] = images
        output = self.towers.vision(inputs, samples=self.micro_batch)
        if self.next:
            self.next.send(output)
            return None
        return embedding(output[:count])

    @torch.no_grad()
    def texts(self, tokens: Tensor) -> Tensor:
        """Embeddings fp32 [N, D] of token ids int64 [N, context]; every rank passes all of them."""
        mine = split_rows(len(tokens), self.mesh.world.size)[self.mesh.world.rank]
        width = self.towers.text.projection.out_features
        outputs = [
            embedding(self.towers.text(trim_padding(tokens[rows]).to(self.device)))
            for rows in _blocks(mine, self.micro_batch)
        ]
        own = torch.cat(outputs) if outputs else torch.empty(0, width, device=self.device)
        return gather_rows(own, len(tokens), self.mesh.world)


def _blocks(rows: slice, size: int) -> Iterator[slice]:
    for start in range(rows.start, rows.stop, size):
        yield slice(start, min(start + size, rows.stop))
