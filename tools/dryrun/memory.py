"""Live bytes of tensors by category, and the peak with what it is made of.

Every storage counts once, from the operator that made it to the release of its last tensor, rounded as the CUDA
allocator rounds. It works on real and on fake tensors alike. Not seen: work space inside a kernel, the context of the
device, buffers of the communication library, and what the allocator loses in fragments.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

ELSEWHERE = "elsewhere"
"""Category of storages in another memory than the device's: not counted."""
_ROUNDING_BYTES = 512  # the smallest block of the CUDA caching allocator


@dataclass(kw_only=True)
class Usage:
    """Bytes at one moment."""

    total: int = 0
    parts: Counter[str] = field(default_factory=Counter)
    """Bytes by category; they add up to the total."""

    def copy(self) -> "Usage":
        """A copy with parts of its own."""
        return Usage(total=self.total, parts=self.parts.copy())

    def add(self, category: str, size: int) -> None:
        """Take in an allocation, or with a negative size a release."""
        self.total += size
        self.parts[category] += size


@dataclass
class _Storage:
    """A storage that is alive."""

    reference: weakref.ref
    """Tells its release."""
    category: str
    size: int


class MemoryTracker:
    """Follows storages from first sight to release."""

    def __init__(self) -> None:
        self.live = Usage()
        self.peaks: dict[str, Usage] = {}
        """Phase -> its highest usage; phase "" is what lies between the phases."""
        self.phase, self.category = "", "other"
        self._alive: dict[int, _Storage] = {}
        """Identity of a storage -> what is known of it."""

    @contextmanager
    def booked_as(self, category: str) -> Iterator[None]:
        """New storages of the block belong to `category`."""
        before, self.category = self.category, category
        try:
            yield
        finally:
            self.category = before

    def enter(self, phase: str, category: str) -> None:
        """New storages belong to `category` from now on."""
        self.phase, self.category = phase, category
        self._offer(self.live)

    def see(self, tensor: Tensor) -> None:
        """Count the storage of a tensor if it is not known yet."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or not storage.nbytes():
            return
        size = 0 if self.category == ELSEWHERE else rounded(storage.nbytes())

        def release(_: object) -> None:
            gone = self._alive.pop(key)
            self.live.add(gone.category, -gone.size)

        self._alive[key] = _Storage(weakref.ref(storage, release), self.category, size)
        self.live.add(self.category, size)
        self._offer(self.live)

    def resized(self, tensor: Tensor) -> None:
        """Count a storage that has grown or shrunk in its place."""
        storage = tensor.untyped_storage()
        known = self._alive.get(storage._cdata)
        if known is None:
            self.see(tensor)
            return
        size = rounded(storage.nbytes())
        self.live.add(known.category, size - known.size)
        known.size = size
        self._offer(self.live)

    def move(self, tensor: Tensor, category: str) -> None:
        """Count a tensor's storage under another category from now on."""
        known = self._alive[tensor.untyped_storage()._cdata]
        self.live.add(known.category, -known.size)
        self.live.add(category, known.size)
        known.category = category

    def _offer(self, usage: Usage) -> None:
        highest = self.peaks.get(self.phase)
        if highest is None or usage.total > highest.total:
            self.peaks[self.phase] = usage.copy()


def rounded(size: int) -> int:
    """Bytes that the allocator gives for so many."""
    return -(-size // _ROUNDING_BYTES) * _ROUNDING_BYTES
