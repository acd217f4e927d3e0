"""The contrastive step as a discrete-event simulation: who computes what when, where it waits, how long the step takes.

Each stage works through the program of engine/pipeline/executor.py (encode, loss, backprop; captions where it would
wait) in the order of engine/pipeline/links.py. A stage is busy while it computes and waits for messages and
collectives, as the engine does: sends cost it nothing, a receive is posted one message ahead, a link carries one
message at a time. The ranks of a stage (tensor, data) do the same at the same time, so one row stands for all of them.

What is not in it: kernels that slow down because a transfer or another rank uses the same hardware.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from engine.pipeline.links import Unit
from tools.simulate.step_program import Action, Compute, Open, Receive, Schedule, Send, Together, program
from tools.timeline.spans import COMPUTE, WAIT, Row, Span, StepTimeline

Durations = Callable[[int, str, Unit | None], float]
"""(stage, phase of the timeline, its unit if it has one) -> seconds; asked in each stage's order of work."""


@dataclass(frozen=True, kw_only=True)
class StageCosts:
    """Seconds of one stage; a backward is without its replay."""

    encode_s: tuple[float, ...]
    """Forward of one micro-batch through each of its chunks."""
    replay_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    encode_text_s: float = 0.0
    """All captions of a rank."""
    backward_text_s: float = 0.0
    """The same backward, their replay included."""


@dataclass(frozen=True, kw_only=True)
class CollectiveCosts:
    """Seconds that all stages spend together once in a step (exchange: twice), where no compute hides them."""

    exchange_s: float = 0.0
    loss_s: float = 0.0
    reduce_s: float = 0.0
    optimizer_s: float = 0.0
    gather_weights_s: float = 0.0


def durations_of(stages: Sequence[StageCosts], together: CollectiveCosts | None = None) -> Durations:
    """Durations that do not depend on the micro-batch."""
    together = together or CollectiveCosts()

    def duration(stage: int, phase: str, unit: Unit | None) -> float:
        name = f"{phase}_s"
        if unit is not None:
            return getattr(stages[stage], name)[unit.chunk]
        return getattr(stages[stage] if phase in ("encode_text", "backward_text") else together, name)

    return duration


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A simulated step."""

    schedule: Schedule
    timeline: StepTimeline
    """One row a stage, for tools/timeline/picture.py and tools/timeline/trace.py. Waiting for a message is a span
    (`wait`), as in a recording; waiting for a collective is a gap."""

    @property
    def step_s(self) -> float:
        """Step time."""
        return self.timeline.stop_s

    @property
    def encode_s(self) -> float:
        """Until the embeddings of all micro-batches are there."""
        return min(span.start_s for span in self._spans("exchange"))

    @property
    def backprop_s(self) -> float:
        """Seconds from the embeddings' gradients to the last backward."""
        return self._backprop_ends_at_s - self._gradients_at_s

    @property
    def encode_bubble(self) -> float:
        """Share of the encode phase in which a stage does not compute, mean over stages."""
        return self._idle(0.0, self.encode_s)

    @property
    def backprop_bubble(self) -> float:
        """The same of backprop."""
        return self._idle(self._gradients_at_s, self._backprop_ends_at_s)

    @property
    def idle(self) -> float:
        """Share of the step in which a stage neither computes nor takes part in a collective, mean over stages."""
        return sum(map(self.timeline.idle, self.timeline.rows)) / len(self.timeline.rows)

    @cached_property
    def _gradients_at_s(self) -> float:
        return max(span.stop_s for span in self._spans("exchange"))

    @cached_property
    def _backprop_ends_at_s(self) -> float:
        return min(span.start_s for span in self._spans("reduce"))

    def _spans(self, phase: str) -> Iterator[Span]:
        return (span for row in self.timeline.rows for span in row.spans if span.phase == phase)

    def _idle(self, start_s: float, stop_s: float) -> float:
        busy = sum(
            span.stop_s - span.start_s
            for row in self.timeline.rows
            for span in row.spans
            if span.phase in COMPUTE and start_s <= span.start_s and span.stop_s <= stop_s
        )
        available = len(self.timeline.rows) * (stop_s - start_s)
        return 1 - busy / available if available else 0.0


def bubble_bound(stages: int, micro_batches: int, chunks: int = 1) -> float:
    """(P - 1) / (v m + P - 1): the bubble of a phase whose units all take the same time (arXiv 2104.04473)."""
    return (stages - 1) / (chunks * micro_batches + stages - 1)


def simulate(schedule: Schedule, durations: Durations) -> Simulation:
    """Run every stage's program. The order of work follows from the schedule alone, the times from the durations."""
    world = _World(schedule, durations)
    stages = [_Stage(world, stage) for stage in range(schedule.stages)]
    running = list(stages)
    while running:
        moved = [stage.advance() for stage in running]
        if not any(moved):
            raise RuntimeError(f"stages {[stage.index for stage in running]} wait for each other for ever")
        running = [stage for stage in running if not stage.done]
    rows = [Row(rank=s.index, tensor=0, pipeline=s.index, data=0, spans=s.spans) for s in stages]
    return Simulation(schedule=schedule, timeline=StepTimeline(step=None, rows=rows))


@dataclass
class _Link:
    """Messages to one inbox, in order; a transfer starts when both sides are ready and the link is free."""

    schedule: Schedule
    sent_s: list[float] = field(default_factory=list)
    posted_s: list[float] = field(default_factory=list)
    free_s: float = -math.inf
    received: int = 0

    def receive(self) -> float | None:
        """When the next message is there; None while it has not been sent."""
        if self.received == len(self.sent_s):
            return None
        start = max(self.sent_s[self.received], self.posted_s[self.received], self.free_s)
        self.free_s = start + self.schedule.transfer_s
        self.received += 1
        return self.free_s + self.schedule.latency_s


@dataclass
class _World:
    """What the stages share."""

    schedule: Schedule
    durations: Durations
    links: dict[tuple[str, int], _Link] = field(init=False)
    arrivals: dict[Together, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))

    def __post_init__(self) -> None:
        stages = range(self.schedule.stages)
        self.links = {(way, stage): _Link(self.schedule) for way in ("forward", "backward") for stage in stages}


class _Stage:
    """A stage's clock and what it has done."""

    def __init__(self, world: _World, index: int):
        self.world, self.index = world, index
        self.clock_s = 0.0
        self.spans: list[Span] = []
        self._actions = program(world.schedule, index)
        self._action = next(self._actions, None)

    @property
    def done(self) -> bool:
        """The program has ended."""
        return self._action is None

    def advance(self) -> bool:
        """Go on until another stage has to act first; whether anything was done."""
        moved = False
        while self._action is not None and self._do(self._action):
            self._action = next(self._actions, None)
            moved = True
        return moved

    def _do(self, action: Action) -> bool:
        """Whether it could be done now."""
        match action:
            case Compute(phase, unit):
                self._spend(phase, self.world.durations(self.index, phase, unit), unit)
            case Together(phase):
                return self._meet(action, phase)
            case Open(inbox):
                self.world.links[inbox].posted_s.append(self.clock_s)
            case Send(inbox):
                self.world.links[inbox].sent_s.append(self.clock_s)
            case Receive(inbox):
                return self._receive(self.world.links[inbox])
        return True

    def _receive(self, link: _Link) -> bool:
        there_s = link.receive()
        if there_s is None:
            return False
        self._spend(WAIT, max(0.0, there_s - self.clock_s))
        link.posted_s.append(self.clock_s)
        return True

    def _meet(self, action: Together, phase: str) -> bool:
        arrivals = self.world.arrivals[action]
        arrivals.setdefault(self.index, self.clock_s)
        if len(arrivals) < self.world.schedule.stages:
            return False
        self.clock_s = max(arrivals.values())
        self._spend(phase, self.world.durations(self.index, phase, None))
        return True

    def _spend(self, phase: str, seconds: float, unit: Unit | None = None) -> None:
        start, self.clock_s = self.clock_s, self.clock_s + seconds
        self.spans.append(
            Span(
                rank=self.index,
                step=0,
                phase=phase,
                start_s=start,
                stop_s=self.clock_s,
                micro_batch=unit.micro_batch if unit else None,
                chunk=unit.chunk if unit else None,
            )
        )
