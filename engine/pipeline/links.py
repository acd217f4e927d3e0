"""The pipeline as one rank sees it: order of its units of work, links to its neighbours, messages posted ahead.

A unit is one micro-batch through one chunk of layers. With one chunk a rank (the plain pipeline) the order is that of
the micro-batches. With v chunks (virtual stages; Narayanan et al. 2021, arXiv 2104.04473, section 2.2) rank r holds
chunks r, r + P, r + 2P, … of the tower, micro-batches go round the ring of ranks v times in groups of P, and the bubble
shrinks from (P - 1) / (m + P - 1) to (P - 1) / (v m + P - 1). All ranks work the units in the same order, and backprop
in the reverse order, so messages on every link arrive in the order in which they are wanted.
"""

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.parallel.mesh import Mesh
from engine.pipeline.p2p import Link, OwnLink, StageLink

Backward = Callable[[bool], AbstractContextManager]
"""(this is the last backward of these parameters in this step) -> context for it; where gradient reduction starts."""


@dataclass(frozen=True)
class Unit:
    """One micro-batch through one chunk of this rank's layers."""

    chunk: int
    micro_batch: int


def forward_order(micro_batches: int, stages: int, chunks: int, group: int | None = None) -> list[Unit]:
    """Units in the order of the encode phase; `group` micro-batches share a trip round the ring (None: as many as
    stages). With all of them in one group a chunk works everything it has before the next one begins.
    """
    group = (group or stages) if chunks > 1 else micro_batches
    return [
        Unit(chunk, i)
        for first in range(0, micro_batches, group)
        for chunk in range(chunks)
        for i in range(first, min(first + group, micro_batches))
    ]


class Inbox:
    """A known number of messages from one neighbour; the next one is always asked for before the last is worked on."""

    def __init__(self, link: Link, messages: int):
        self.link = link
        self.to_post = messages
        self._post()

    def _post(self) -> None:
        if self.to_post:
            self.link.post_receive()
            self.to_post -= 1

    def receive(self) -> Tensor:
        """Wait for the next message."""
        message = self.link.receive()
        self._post()
        return message


class Pipeline:
    """This rank's place in the ring of stages."""

    def __init__(self, mesh: Mesh, chunks: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        """shape and dtype: one message, the packed tokens of a micro-batch."""
        stage, stages = mesh.pipeline.rank, mesh.pipeline.size
        before, after = (stage - 1) % stages, (stage + 1) % stages
        forward, backward = mesh.links.forward, mesh.links.backward
        message: dict[str, Any] = {"shape": shape, "dtype": dtype, "device": device}
        self.mesh, self.chunks = mesh, chunks
        if stages == 1:
            forwards: deque[Tensor] = deque()
            backwards: deque[Tensor] = deque()
            self.previous: Link = OwnLink(sending=backwards, receiving=forwards, **message)
            self.next: Link = OwnLink(sending=forwards, receiving=backwards, **message)
            return
        self.previous = StageLink(
            mesh.pipeline, before, sending=backward[stage % 2], receiving=forward[before % 2], **message
        )
        self.next = StageLink(
            mesh.pipeline, after, sending=forward[stage % 2], receiving=backward[after % 2], **message
        )

    def starts(self, unit: Unit) -> bool:
        """The unit takes images, not a message."""
        return self.mesh.is_first_stage and unit.chunk == 0

    def ends(self, unit: Unit) -> bool:
        """The unit computes embeddings, not a message."""
        return self.mesh.is_last_stage and unit.chunk == self.chunks - 1

    def forward_inbox(self, units: list[Unit]) -> Inbox:
        """Inputs of `units`, from the previous stage."""
        return Inbox(self.previous, sum(not self.starts(unit) for unit in units))

    def backward_inbox(self, units: list[Unit]) -> Inbox:
        """Gradients of the outputs of `units`, from the next stage."""
        return Inbox(self.next, sum(not self.ends(unit) for unit in units))
