"""Transfers between neighbouring stages: receives posted ahead, sends not waited for.

Activations only travel to the next stage and gradients only to the previous one, each in a group of its own
(engine/parallel/mesh.py, Links), so both may be under way and the messages of a direction arrive in the order they were
sent.
"""

from collections import deque
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from engine.parallel.mesh import Axis, Group


class Link(Protocol):
    """Both directions between this stage and one neighbour."""

    shape: tuple[int, ...]
    """Shape of every message."""
    dtype: torch.dtype
    """Shape of every message."""

    def post_receive(self) -> None:
        """Ask for the next message."""

    def receive(self) -> Tensor:
        """The oldest message asked for; waits for it."""

    def send(self, message: Tensor) -> None:
        """Start sending."""

    def drain(self) -> None:
        """Wait until everything sent has left."""


class OwnLink:
    """Between the chunks of the only stage: a message is there as soon as it is sent."""

    def __init__(
        self,
        *,
        sending: deque[Tensor],
        receiving: deque[Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.shape, self.dtype = shape, dtype
        self._sending, self._receiving = sending, receiving

    def post_receive(self) -> None:
        """Nothing to ask for."""

    def receive(self) -> Tensor:
        """The oldest message."""
        return self._receiving.popleft()

    def send(self, message: Tensor) -> None:
        """Leave it to the next chunk."""
        self._sending.append(message.detach())

    def drain(self) -> None:
        """Nothing is under way."""


class StageLink:
    """Both directions between this stage and one neighbour."""

    def __init__(
        self,
        pipeline: Axis,
        neighbour: int,
        *,
        sending: Group,
        receiving: Group,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ):
        """neighbour: pipeline rank of the other end; shape and dtype of every message."""
        self.sending, self.receiving = sending, receiving
        self.peer = dist.get_global_rank(pipeline.group, neighbour)
        self.shape, self.dtype, self.device = shape, dtype, device
        self._receiving: deque[tuple[dist.Work, Tensor]] = deque()
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()

    def post_receive(self) -> None:
        """Ask for the next message."""
        buffer = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        self._receiving.append((_started(dist.irecv(buffer, src=self.peer, group=self.receiving)), buffer))

    def receive(self) -> Tensor:
        """The oldest message asked for; waits for it."""
        work, buffer = self._receiving.popleft()
        work.wait()
        return buffer

    def send(self, message: Tensor) -> None:
        """Start sending; the message is kept alive until it has left."""
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()[0].wait()
        message = message.detach().contiguous()
        self._sending.append((_started(dist.isend(message, dst=self.peer, group=self.sending)), message))

    def drain(self) -> None:
        """Wait until everything sent has left."""
        while self._sending:
            self._sending.popleft()[0].wait()


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this rank is not in the pipeline group"
    return work
