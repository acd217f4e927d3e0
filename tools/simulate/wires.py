"""What travels while a stage works: messages between stages, and the shards of weights and gradients."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Wire:
    """What a message between stages takes."""

    latency_s: float = 0.0
    """Seconds from the end of a message's transfer to its arrival."""
    transfer_s: float = 0.0
    """How long a message occupies its link: bytes / bandwidth."""


@dataclass
class Link:
    """Messages to one inbox, in order; a transfer starts when both sides are ready and the link is free."""

    wire: Wire
    sent_s: list[float] = field(default_factory=list)
    posted_s: list[float] = field(default_factory=list)
    free_s: float = -math.inf
    received: int = 0

    def receive(self) -> float | None:
        """When the next message is there; None while it has not been sent."""
        if self.received == len(self.sent_s):
            return None
        start = max(self.sent_s[self.received], self.posted_s[self.received], self.free_s)
        self.free_s = start + self.wire.transfer_s
        self.received += 1
        return self.free_s + self.wire.latency_s


@dataclass(frozen=True, kw_only=True)
class ShardCosts:
    """Seconds of the sharded parts of a stage: its chunks, then the captions (engine/parallel/sharded.py)."""

    gather_s: Sequence[float]
    """All-gather of a part's weights, once."""
    reduce_s: Sequence[float]
    """Reduce-scatter of a part's gradients."""
    overlap: bool = True
    """Whether a reduction starts behind the part's last backward; otherwise when its end is wanted."""


@dataclass
class ShardLine:
    """A stage's way to the other owners of its shards, which do the same at the same time: one transfer at a time."""

    costs: ShardCosts
    free_s: float = 0.0
    busy_s: float = 0.0
    """Seconds of all transfers."""
    _there_s: dict[int, float] = field(default_factory=dict)
    """Part whose weights were asked for -> when they are here."""
    _reduced_s: dict[int, float] = field(default_factory=dict)

    def gather(self, part: int, now_s: float) -> None:
        """Ask for the weights of a part; nothing where they are on their way."""
        if part not in self._there_s:
            self._there_s[part] = self._transfer(self.costs.gather_s[part], now_s)

    def gathered_s(self, part: int, now_s: float) -> float:
        """When the weights of a part are here."""
        self.gather(part, now_s)
        return self._there_s.pop(part)

    def reduce(self, part: int, now_s: float) -> None:
        """The gradients of a part are complete on this stage."""
        if self.costs.overlap:
            self._reduced_s[part] = self._transfer(self.costs.reduce_s[part], now_s)

    def reduced_s(self, part: int, now_s: float) -> float:
        """When they are reduced."""
        if part not in self._reduced_s:
            return self._transfer(self.costs.reduce_s[part], now_s)
        return self._reduced_s.pop(part)

    def _transfer(self, seconds: float, now_s: float) -> float:
        self.free_s = max(self.free_s, now_s) + seconds
        self.busy_s += seconds
        return self.free_s
