"""Stage inputs between the encode phase and their replay: on the device, or in host memory.

The replay takes micro-batches in the reverse order of the encode phase, so a stash is a stack, and what is popped next
is known: the host's stash starts that copy while the stage works on the one before. Bytes of a stash: micro-batches of
the replica x chunks x message (docs/contrastive_step.md); it is the largest memory that the batch size decides.
"""

import torch
from torch import Tensor

from engine.parallel.device import SideStream


class DeviceStash:
    """Keeps the inputs where they are."""

    def __init__(self) -> None:
        self._inputs: list[Tensor | None] = []

    def push(self, hidden: Tensor | None) -> None:
        """Keep a chunk's input; None where the tower starts."""
        self._inputs.append(hidden)

    def prefetch(self) -> None:
        """Nothing to fetch."""

    def pop(self) -> Tensor | None:
        """The input kept last."""
        return self._inputs.pop()


class HostStash:
    """Keeps the inputs in (pinned) host memory: one copy out in the encode phase, one back ahead of the replay.

    Host buffers are used again in every step, because pinning memory takes longer than a copy.
    """

    def __init__(self, device: torch.device):
        self.side = SideStream(device)
        self._kept: list[Tensor | None] = []
        self._free: list[Tensor] = []
        self._fetched: Tensor | None = None

    def push(self, hidden: Tensor | None) -> None:
        """Start copying a chunk's input out; its device memory is free as soon as the copy has been made."""
        if hidden is not None:
            buffer = self._free.pop() if self._free else self.side.host_buffer(hidden)
            self.side.copy_out(hidden, buffer)
            hidden = buffer
        self._kept.append(hidden)

    def prefetch(self) -> None:
        """Start copying the input that is popped next; after the last push."""
        if self._fetched is None and self._kept and (buffer := self._kept[-1]) is not None:
            self._fetched = self.side.copy_in(buffer)
            # Already free: the next copy into it is queued on the same stream behind this one.
            self._free.append(buffer)

    def pop(self) -> Tensor | None:
        """The input kept last, on the device; the copy of the one before it is started."""
        self.prefetch()
        self._kept.pop()
        hidden, self._fetched = self._fetched, None
        if hidden is not None:
            self.side.join(hidden)  # before the next copy is queued, which it would otherwise wait for, too
        self.prefetch()
        return hidden
