"""A step on a pipeline as actions, stage by stage. No tensors, no torch: one description, read by three.

The executor (engine/pipeline/executor.py) runs a stage's actions with tensors, the dry run counts what they do there,
and the simulator (tools/simulate) prices them. What follows upon what is written down here, in the programs of the
objectives (engine/objectives/*/program.py) and in that of embeddings (engine/pipeline/forward.py), nowhere else.

A unit is one micro-batch through one chunk of layers. With one chunk a rank (the plain pipeline) the order is that of
the micro-batches. With v chunks (virtual stages; Narayanan et al. 2021, arXiv 2104.04473, section 2.2) rank r holds
chunks r, r + P, r + 2P, … of the tower, micro-batches go round the ring of ranks v times in groups of P, and the bubble
shrinks from (P - 1) / (m + P - 1) to (P - 1) / (v m + P - 1). Messages on every link arrive in the order in which they
are wanted.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

Way = Literal["forward", "backward"]
"""Activations travel forward, to the next stage; gradients backward, to the previous one."""


@dataclass(frozen=True)
class Unit:
    """One micro-batch through one chunk of this rank's layers."""

    chunk: int
    micro_batch: int


@dataclass(frozen=True)
class Open:
    """Post the first receive from one side. Every later one is posted before the message before it is worked on."""

    way: Way


@dataclass(frozen=True)
class Receive:
    """Wait for the next message: the input of the unit that follows, or the gradient of its output."""

    way: Way


@dataclass(frozen=True)
class Send:
    """Start the message that the unit before has made; it is not waited for."""

    way: Way


@dataclass(frozen=True)
class Forward:
    """A unit forward."""

    unit: Unit
    span: str
    """Name in the step's clock."""
    keeps: bool
    """Whether activations stay for the backward; otherwise the input does, for a replay."""
    trains: bool = True
    """Whether a backward follows at all; without one nothing stays."""


@dataclass(frozen=True)
class Replay:
    """A unit forward once more, from its stashed input and with activations. It needs nothing from other stages."""

    unit: Unit


@dataclass(frozen=True)
class Backward:
    """A unit backward."""

    unit: Unit
    is_last: bool
    """Whether no other of the chunk follows: where the reduction of its gradients starts."""


@dataclass(frozen=True)
class Alone:
    """Work of the objective on this rank, of no unit."""

    span: str
    share: tuple[float, float] = (0.0, 1.0)
    """Beginning and end of what of it is done, 0 to 1, where work comes in parts; borders are those nearest to it."""

    def parts(self, number: int) -> slice:
        """Which of so many parts, in the order in which they are done."""
        first, last = (int(number * border + 0.5) for border in self.share)
        return slice(first, last)


@dataclass(frozen=True)
class Together:
    """A collective of all stages: it starts when the last has come, and when all messages have left."""

    span: str
    number: int = 0
    """Number among those of this name in the step."""


@dataclass(frozen=True)
class Gather:
    """Start to bring the weights of a sharded part here (number of the chunk; the captions' side comes last)."""

    part: int


@dataclass(frozen=True)
class Await:
    """Have the weights of a sharded part."""

    part: int


@dataclass(frozen=True)
class Release:
    """Keep the own slices of a sharded part's weights only."""

    part: int


@dataclass(frozen=True)
class Accumulate:
    """Make room for the gradients of a sharded part."""

    part: int


@dataclass(frozen=True)
class Reduced:
    """Have the gradients of a sharded part reduced: they started on their way in its last backward."""

    part: int


Action = (
    Open
    | Receive
    | Send
    | Forward
    | Replay
    | Backward
    | Alone
    | Together
    | Gather
    | Await
    | Release
    | Accumulate
    | Reduced
)
UPDATE = (Together("reduce"), Together("optimizer"), Together("gather_weights"))
"""What follows every program (engine/objectives/update.py)."""


def forward_order(micro_batches: int, stages: int, chunks: int, group: int | None = None) -> list[Unit]:
    """Units in their order forward; `group` micro-batches share a trip round the ring (None: as many as stages).

    With all of them in one group a chunk works everything it has before the next one begins.
    """
    group = (group or stages) if chunks > 1 else micro_batches
    return [
        Unit(chunk, i)
        for first in range(0, micro_batches, max(1, group))
        for chunk in range(chunks)
        for i in range(first, min(first + group, micro_batches))
    ]


@dataclass(frozen=True, kw_only=True)
class Program(ABC):
    """The step of an objective; a subclass says what its stages do."""

    stages: int
    """P."""
    micro_batches: int
    """m of a replica."""
    chunks: int = 1
    """v, chunks of layers a stage holds."""
    round_size: int | None = None
    """G, micro-batches that a chunk works in a row; None: P."""

    def __post_init__(self) -> None:
        """Raise ValueError for what the engine refuses, too (engine/config/layout.py)."""
        if min(self.stages, self.micro_batches, self.chunks) < 1:
            raise ValueError(
                f"stages {self.stages}, micro-batches {self.micro_batches} and chunks {self.chunks} must be at least 1"
            )
        if self.chunks > 1 and self.round_size is None and self.micro_batches % self.stages:
            raise ValueError(
                f"{self.chunks} chunks a stage work groups of as many micro-batches as stages ({self.stages}): give a "
                f"multiple of them as micro-batches, not {self.micro_batches}"
            )

    @abstractmethod
    def actions(self, stage: int) -> Iterator[Action]:
        """Everything that pipeline rank `stage` does, in its order; UPDATE follows."""

    def units(self) -> list[Unit]:
        """Every rank's units, in the order forward."""
        return forward_order(self.micro_batches, self.stages, self.chunks, self.round_size)

    def starts(self, stage: int, unit: Unit) -> bool:
        """Whether the unit takes images, not a message."""
        return stage == 0 and unit.chunk == 0

    def ends(self, stage: int, unit: Unit) -> bool:
        """Whether the unit's output is the tower's, not a message."""
        return stage == self.stages - 1 and unit.chunk == self.chunks - 1

    def returns_gradient(self, stage: int, unit: Unit) -> bool:
        """Whether the unit's backward has a gradient of its input to send."""
        return not self.starts(stage, unit)

    def in_flight(self, stage: int) -> int:
        """Units whose activations wait for their backward at once, at most."""
        held = (_held(action) for action in self.actions(stage))
        return max(accumulate(held, initial=0))


def _held(action: Action) -> int:
    if isinstance(action, Backward):
        return -1
    return int(isinstance(action, Replay) or (isinstance(action, Forward) and action.keeps))
