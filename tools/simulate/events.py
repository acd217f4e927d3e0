"""A step as a discrete-event simulation: who computes what when, where it waits, how long the step takes.

Each stage works through the actions of the engine's own program (engine/pipeline/program.py), of any objective. A stage
is busy while it computes and waits for messages and collectives, as the executor does: sends cost it nothing, a receive
is posted one message ahead, a link carries one message at a time. Weights and gradients that are sharded travel beside
the work, one transfer at a time (tools/simulate/wires.py); what of it a stage waits for is a span of its row. The ranks
of a stage (tensor, data) do the same at the same time, so one row stands for all of them.

What is not in it: kernels that slow down because a transfer or another rank uses the same hardware.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Protocol

from engine.pipeline.program import (
    UPDATE,
    Action,
    Alone,
    Await,
    Backward,
    Forward,
    Gather,
    Open,
    Program,
    Receive,
    Reduced,
    Replay,
    Send,
    Together,
    Unit,
    Way,
)
from tools.simulate.wires import Link, ShardCosts, ShardLine, Wire
from tools.timeline.spans import AWAIT_GRADIENTS, AWAIT_WEIGHTS, COMPUTE, WAIT, Row, Span, StepTimeline


class Durations(Protocol):
    """Seconds of work; asked in each stage's order of it."""

    def __call__(self, stage: int, phase: str, unit: Unit | None, turn: Alone | None = None) -> float:
        """phase: of the timeline; unit: if it has one; turn: of work that is of no unit."""


@dataclass(frozen=True, kw_only=True)
class StageCosts:
    """Seconds of one stage; a backward is without its replay."""

    forward_s: tuple[float, ...]
    """Forward of one micro-batch through each of its chunks."""
    backward_s: tuple[float, ...]
    replay_s: tuple[float, ...] | None = None
    """Forward once more; None: as long as the first time."""
    encode_text_s: float = 0.0
    """All captions of a rank."""
    backward_text_s: float = 0.0
    """The same backward, their replay included."""
    caption_parts: int = 0
    """Parts of equal length in which captions are done; 0: as many as wanted."""
    teacher_s: float = 0.0
    """A rank's share of the teaching."""

    def unit_s(self, span: str, chunk: int) -> float:
        """Seconds of one micro-batch through one chunk."""
        if span == "backward":
            return self.backward_s[chunk]
        return (self.forward_s if span != "replay" or self.replay_s is None else self.replay_s)[chunk]

    def turn_s(self, turn: Alone) -> float:
        """Seconds of a turn of what is of no unit."""
        whole_s = getattr(self, f"{turn.span}_s")
        if not self.caption_parts:
            return whole_s * (turn.share[1] - turn.share[0])
        parts = turn.parts(self.caption_parts)
        return whole_s * (parts.stop - parts.start) / self.caption_parts


@dataclass(frozen=True, kw_only=True)
class CollectiveCosts:
    """Seconds that all stages spend together once in a step (exchange: twice), where no compute hides them."""

    deal_s: float = 0.0
    exchange_s: float = 0.0
    loss_s: float = 0.0
    reduce_s: float = 0.0
    optimizer_s: float = 0.0
    gather_weights_s: float = 0.0


def durations_of(stages: Sequence[StageCosts], together: CollectiveCosts | None = None) -> Durations:
    """Durations that do not depend on the micro-batch."""
    together = together or CollectiveCosts()

    def duration(stage: int, phase: str, unit: Unit | None, turn: Alone | None = None) -> float:
        if unit is not None:
            return stages[stage].unit_s(phase, unit.chunk)
        return getattr(together, f"{phase}_s") if turn is None else stages[stage].turn_s(turn)

    return duration


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A simulated step."""

    program: Program
    timeline: StepTimeline
    """One row a stage, for tools/timeline/picture.py and tools/timeline/trace.py. Waiting for a message is a span
    (`wait`), as in a recording, and so is waiting for shards; waiting for a collective is a gap."""
    sharded_s: tuple[float, ...] = ()
    """Seconds of each stage's transfers of sharded weights and gradients, hidden or not."""

    @property
    def step_s(self) -> float:
        """Step time."""
        return self.timeline.stop_s

    @property
    def encode_s(self) -> float:
        """Until the embeddings of all micro-batches are there; 0 without a barrier."""
        return min(span.start_s for span in self._spans("exchange"))

    @property
    def backprop_s(self) -> float:
        """Seconds from the embeddings' gradients, or the teacher's targets, to the last backward."""
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


def bubble_bound(program: Program) -> float:
    """(P - 1) / (v m + P - 1): the bubble of a phase whose units all take the same time (arXiv 2104.04473)."""
    return (program.stages - 1) / (program.chunks * program.micro_batches + program.stages - 1)


def simulate(
    program: Program, durations: Durations, wire: Wire | None = None, shards: Sequence[ShardCosts] | None = None
) -> Simulation:
    """Run every stage's actions. The order of work follows from the program alone, the times from the durations.

    shards: of each stage; None where nothing is sharded, or where it takes no time.
    """
    world = _World(program, durations, wire or Wire())
    costs: Sequence[ShardCosts | None] = shards or [None] * program.stages
    stages = [_Stage(world, stage, of_stage) for stage, of_stage in enumerate(costs)]
    running = list(stages)
    while running:
        moved = [stage.advance() for stage in running]
        if not any(moved):
            raise RuntimeError(f"stages {[stage.index for stage in running]} wait for each other for ever")
        running = [stage for stage in running if not stage.done]
    rows = [Row(rank=s.index, tensor=0, pipeline=s.index, data=0, spans=s.spans) for s in stages]
    sharded = tuple(stage.shards.busy_s for stage in stages if stage.shards is not None)
    return Simulation(program=program, timeline=StepTimeline(step=None, rows=rows), sharded_s=sharded)


@dataclass
class _World:
    """What the stages share."""

    program: Program
    durations: Durations
    wire: Wire
    links: dict[tuple[Way, int], Link] = field(init=False)
    """Inboxes, by way and receiving stage."""
    arrivals: dict[Together, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))

    def __post_init__(self) -> None:
        ways: tuple[Way, ...] = ("forward", "backward")
        self.links = {(way, stage): Link(self.wire) for way in ways for stage in range(self.program.stages)}


class _Stage:
    """A stage's clock and what it has done."""

    def __init__(self, world: _World, index: int, shards: ShardCosts | None):
        self.world, self.index = world, index
        self.shards = None if shards is None else ShardLine(shards)
        self.clock_s = 0.0
        self.spans: list[Span] = []
        self._actions = chain(world.program.actions(index), UPDATE)
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
            case Forward(unit, span):
                self._work(span, unit)
            case Replay(unit):
                self._work("replay", unit)
            case Backward(unit, is_last):
                self._work("backward", unit)
                if is_last and self.shards is not None:
                    self.shards.reduce(unit.chunk, self.clock_s)
            case Alone(span):
                self._work(span, turn=action)
            case Together(span):
                return self._meet(action, span)
            case Open(way):
                self.world.links[way, self.index].posted_s.append(self.clock_s)
            case Send(way):
                there = self.index + (1 if way == "forward" else -1)
                self.world.links[way, there % self.world.program.stages].sent_s.append(self.clock_s)
            case Receive(way):
                return self._receive(self.world.links[way, self.index])
            case Gather() | Await() | Reduced() if self.shards is not None:
                self._shard(action, self.shards)
        return True

    def _shard(self, action: Gather | Await | Reduced, line: ShardLine) -> None:
        match action:
            case Gather(part):
                line.gather(part, self.clock_s)
            case Await(part):
                self._wait_until(line.gathered_s(part, self.clock_s), AWAIT_WEIGHTS)
            case Reduced(part):
                self._wait_until(line.reduced_s(part, self.clock_s), AWAIT_GRADIENTS)

    def _work(self, span: str, unit: Unit | None = None, turn: Alone | None = None) -> None:
        self._spend(span, self.world.durations(self.index, span, unit, turn), unit)

    def _wait_until(self, there_s: float, span: str) -> None:
        self._spend(span, max(0.0, there_s - self.clock_s))

    def _receive(self, link: Link) -> bool:
        there_s = link.receive()
        if there_s is None:
            return False
        self._wait_until(there_s, WAIT)
        link.posted_s.append(self.clock_s)
        return True

    def _meet(self, action: Together, phase: str) -> bool:
        arrivals = self.world.arrivals[action]
        arrivals.setdefault(self.index, self.clock_s)
        if len(arrivals) < self.world.program.stages:
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
