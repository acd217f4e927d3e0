"""The pipeline as one rank sees it: links to its neighbours, messages posted ahead."""

from collections import deque
from typing import Any

import torch
from torch import Tensor

from engine.parallel.mesh import Mesh
from engine.pipeline.p2p import Link, OwnLink, StageLink
from engine.pipeline.program import Way


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

    def __init__(self, mesh: Mesh, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        """shape and dtype: one message, the packed tokens of a micro-batch."""
        stage, stages = mesh.pipeline.rank, mesh.pipeline.size
        before, after = (stage - 1) % stages, (stage + 1) % stages
        forward, backward = mesh.links.forward, mesh.links.backward
        message: dict[str, Any] = {"shape": shape, "dtype": dtype, "device": device}
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

    def inbox(self, way: Way, messages: int) -> Inbox:
        """Messages that come this way: activations from the previous stage, gradients from the next one."""
        return Inbox(self.previous if way == "forward" else self.next, messages)

    def send(self, way: Way, message: Tensor) -> None:
        """Start sending to the neighbour on that side."""
        (self.next if way == "forward" else self.previous).send(message)

    def drain(self) -> None:
        """Wait until everything sent has left."""
        self.next.drain()
        self.previous.drain()
