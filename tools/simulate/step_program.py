"""What a stage does in a contrastive step, action by action: engine/pipeline/executor.py without its tensors.

The order of units is the engine's own (engine/pipeline/links.py); tests compare the actions with recordings of real
steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.pipeline.links import Unit, forward_order


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What is simulated, but for its durations."""

    stages: int
    """P."""
    micro_batches: int
    """m of a replica."""
    chunks: int = 1
    """v, chunks of layers a stage holds."""
    keep: int | tuple[int, ...] = 0
    """k, the last micro-batches that are not replayed; a tuple where stages differ."""
    latency_s: float = 0.0
    """Seconds from the end of a message's transfer to its arrival."""
    transfer_s: float = 0.0
    """How long a message occupies its link: bytes / bandwidth."""

    def __post_init__(self) -> None:
        """Raises ValueError for what the engine refuses, too (engine/config/read.py)."""
        if min(self.stages, self.micro_batches, self.chunks) < 1:
            raise ValueError(
                f"stages {self.stages}, micro-batches {self.micro_batches} and chunks {self.chunks} must be at least 1"
            )
        if self.chunks > 1 and (self.stages == 1 or self.micro_batches % self.stages):
            raise ValueError(
                f"{self.chunks} chunks a stage need more than one stage ({self.stages}) and a multiple of them as "
                f"micro-batches ({self.micro_batches})"
            )
        wrong = [k for k in map(self.kept, range(self.stages)) if not 0 <= k <= self.micro_batches]
        if wrong:
            raise ValueError(f"keep {wrong[0]} is not within 0 and the {self.micro_batches} micro-batches")

    def kept(self, stage: int) -> int:
        """k of a stage."""
        return self.keep[stage] if isinstance(self.keep, tuple) else self.keep


@dataclass(frozen=True)
class Compute:
    """Work of this stage alone: a phase of the timeline."""

    phase: str
    unit: Unit | None = None


@dataclass(frozen=True)
class Together:
    """A collective of all stages: starts when the last has come."""

    phase: str
    number: int
    """Number of this phase in the step."""


@dataclass(frozen=True)
class Open:
    """Post the first receive of an inbox: (forward | backward, receiving stage)."""

    inbox: tuple[str, int]


@dataclass(frozen=True)
class Receive:
    """Wait for the next message, then post the receive of the one after it."""

    inbox: tuple[str, int]


@dataclass(frozen=True)
class Send:
    """Start a message to the inbox of another stage; not waited for."""

    inbox: tuple[str, int]


Action = Compute | Together | Open | Receive | Send


def program(schedule: Schedule, stage: int) -> Iterator[Action]:
    """The actions of engine/pipeline/executor.py on this stage, in its order."""
    units = forward_order(schedule.micro_batches, schedule.stages, schedule.chunks)
    yield from _encode(schedule, stage, units)
    yield Together("exchange", 0)
    yield Together("loss", 0)
    yield Together("exchange", 1)
    yield from _backprop(schedule, stage, units)
    for phase in ("reduce", "optimizer", "gather_weights"):
        yield Together(phase, 0)


def _encode(schedule: Schedule, stage: int, units: list[Unit]) -> Iterator[Action]:
    inbox, following = ("forward", stage), ("forward", (stage + 1) % schedule.stages)
    first, last = stage == 0, stage == schedule.stages - 1
    yield Open(inbox)
    if not first:
        yield Compute("encode_text")
    for unit in units:
        if not (first and unit.chunk == 0):
            yield Receive(inbox)
        yield Compute("encode", unit)
        if not (last and unit.chunk == schedule.chunks - 1):
            yield Send(following)
    if first:
        yield Compute("encode_text")


def _backprop(schedule: Schedule, stage: int, units: list[Unit]) -> Iterator[Action]:
    inbox, previous = ("backward", stage), ("backward", (stage - 1) % schedule.stages)
    first, last = stage == 0, stage == schedule.stages - 1
    replayed = schedule.micro_batches - schedule.kept(stage)
    yield Open(inbox)
    if not last:
        yield Compute("backward_text")
    for unit in reversed(units):
        if unit.micro_batch < replayed:
            yield Compute("replay", unit)
        if not (last and unit.chunk == schedule.chunks - 1):
            yield Receive(inbox)
        yield Compute("backward", unit)
        if not (first and unit.chunk == 0):
            yield Send(previous)
    if last:
        yield Compute("backward_text")
