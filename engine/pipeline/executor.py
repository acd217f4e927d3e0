"""Runs a stage's program (engine/pipeline/program.py) with tensors. Nothing about ViTs or losses in it.

What an objective adds are its `Passes`: what becomes of the tower's outputs, which gradient they get, and the work that
is of no unit (captions, teacher, exchanges, loss).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from engine.parallel.mesh import Mesh
from engine.parallel.sharded import ShardedPart
from engine.pipeline.clock import Phases
from engine.pipeline.links import Inbox, Pipeline
from engine.pipeline.outputs import KeptOutputs
from engine.pipeline.program import (
    Accumulate,
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
    Release,
    Replay,
    Send,
    Together,
    Unit,
    Way,
)
from engine.pipeline.stash import DeviceStash, HostStash
from models.tensors.products import fast_products

Chunk = Callable[[Tensor | None, int], Tensor]
"""(chunk input, or None where the tower starts; micro-batch) -> chunk output."""
BackwardContext = Callable[[bool], AbstractContextManager]
"""(this is the last backward of these parameters in this step) -> context for it; where gradient reduction starts."""


@dataclass(kw_only=True)
class Work:
    """What a program's units run on this rank, in every step; forward passes alone need the chunks only."""

    chunks: Sequence[Chunk]
    """The chunks of this rank, in tower order."""
    backward: Sequence[BackwardContext] = ()
    """One a chunk."""
    outputs: Sequence[KeptOutputs] = ()
    """Kept outputs of products, one a chunk."""
    parts: Sequence[ShardedPart | None] = ()
    """The chunks, and the captions' side where there is one; None: not sharded, so its weights are always here."""
    below: Mapping[int, Chunk] = field(default_factory=dict)
    """Number of a chunk -> its layers at the input with nothing to train in them and below: run once, without graph.
    What they answer with waits for the replay instead of the chunk's input, and is what `chunks` takes.
    """


class Passes(Protocol):
    """One step of an objective: what its program does beside the units."""

    def take(self, unit: Unit, output: Tensor) -> None:
        """What a unit that ends the tower has computed, without graph."""

    def gradient(self, unit: Unit) -> Tensor | None:
        """Gradient of that output; None for a loss."""

    def alone(self, action: Alone) -> None:
        """Work of this rank."""

    def together(self, span: str, number: int) -> None:
        """The collective of this name, the number-th in this step."""


class Executor:
    """Runs steps of one program on this rank."""

    def __init__(
        self,
        mesh: Mesh,
        program: Program,
        *,
        hidden: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        offload_stash: bool = False,
        beside: Iterable[torch.dtype] = (),
    ):
        """hidden, dtype: a message between stages. offload_stash: stage inputs wait in host memory for their replay.

        beside: weights of towers that run in the objective's own work (teachers).
        """
        self.program, self.stage = program, mesh.pipeline.rank
        self.actions = tuple(program.actions(self.stage))
        self.messages = Counter(action.way for action in self.actions if isinstance(action, Receive))
        self.pipeline = Pipeline(mesh, hidden, dtype, device)
        self.products: Callable[[], AbstractContextManager] = partial(fast_products, device, dtype, *beside)
        """What a step's products are computed in; a dry run counts them as the model has them."""
        self.stash = HostStash(device) if offload_stash else DeviceStash()

    def run(self, work: Work, passes: Passes, phases: Phases) -> None:
        """One step up to its update; gradients are left in the parameters. Collective over the mesh."""
        run = _Run(self, work, passes, phases)
        with run.taking, self.products():
            for action in self.actions:
                run.do(action)
        self.pipeline.drain()


@dataclass
class _Run:
    """State of one step."""

    executor: Executor
    work: Work
    passes: Passes
    phases: Phases
    inboxes: dict[Way, Inbox] = field(default_factory=dict)
    arrived: Tensor | None = None
    """The message that has come and that the next unit takes."""
    leaving: Tensor | None = None
    """What the unit before has made and `Send` takes."""
    in_flight: dict[Unit, tuple[Tensor | None, Tensor]] = field(default_factory=dict)
    """Input and output of a chunk, with the graph between them."""
    taking: ExitStack = field(default_factory=ExitStack)
    """Contexts in which a unit finds the outputs that it has kept, from its replay to the end of its backward."""
    replayed: Unit | None = None

    def do(self, action: Action) -> None:
        match action:
            case Open(way):
                self._open(way)
            case Receive(way):
                with self.phases.time("wait"):
                    self.arrived = self.inboxes[way].receive()
            case Forward():
                self._forward(action)
            case Replay(unit):
                self._replay(unit)
            case Backward(unit, is_last):
                self._backward(unit, is_last)
            case Send(way):
                message, self.leaving = self.leaving, None
                assert message is not None, "the unit before has sent nothing"
                self.executor.pipeline.send(way, message)
            case Alone(span):
                with self.phases.time(span):
                    self.passes.alone(action)
            case Together(span, number):
                with self.phases.time(span):
                    self.executor.pipeline.drain()
                    self.passes.together(span, number)
            case _:
                self._shard(action)

    def _open(self, way: Way) -> None:
        self.inboxes[way] = self.executor.pipeline.inbox(way, self.executor.messages[way])
        if way == "backward":
            self.executor.stash.prefetch()

    def _forward(self, action: Forward) -> None:
        unit, hidden = action.unit, self._arrived()
        leaving = self.work.outputs[unit.chunk].leaving(unit.micro_batch) if action.trains else nullcontext()
        with self.phases.time(action.span, unit):
            if unit.chunk in self.work.below:
                with torch.no_grad():
                    hidden = self.work.below[unit.chunk](hidden, unit.micro_batch)
            with torch.set_grad_enabled(action.keeps), leaving:
                if action.keeps:
                    self._ask_for_gradient(unit, hidden)
                output = self.work.chunks[unit.chunk](hidden, unit.micro_batch)
        if action.keeps:
            self.in_flight[unit] = hidden, output
        elif action.trains:
            self.executor.stash.push(hidden)
        if self._ends(unit):
            self.passes.take(unit, output.detach())
        else:
            self.leaving = output

    def _replay(self, unit: Unit) -> None:
        self._take_outputs(unit)
        self.replayed = unit
        with self.phases.time("replay", unit):
            hidden = self.executor.stash.pop()
            self._ask_for_gradient(unit, hidden)
            self.in_flight[unit] = hidden, self.work.chunks[unit.chunk](hidden, unit.micro_batch)

    def _backward(self, unit: Unit, is_last: bool) -> None:
        hidden, output = self.in_flight.pop(unit)
        gradient = self.passes.gradient(unit) if self._ends(unit) else self._arrived()
        if self.replayed != unit:
            self._take_outputs(unit)
        with self.phases.time("backward", unit), self.work.backward[unit.chunk](is_last):
            torch.autograd.backward(output, gradient)
        self.taking.close()
        if hidden is not None and self._returns(unit):
            self.leaving = hidden.grad

    def _ask_for_gradient(self, unit: Unit, hidden: Tensor | None) -> None:
        if hidden is not None and self._returns(unit):
            hidden.requires_grad_()

    def _returns(self, unit: Unit) -> bool:
        return self.executor.program.returns_gradient(self.executor.stage, unit)

    def _take_outputs(self, unit: Unit) -> None:
        self.taking.enter_context(self.work.outputs[unit.chunk].taking(unit.micro_batch))

    def _shard(self, action: Action) -> None:
        match action:
            case Gather(part):
                self._part(part).gather()
            case Await(part):
                self._part(part).wait()
            case Release(part):
                self._part(part).release()
            case Accumulate(part):
                self._part(part).open_gradients()
            case Reduced(part):
                self._part(part).finish()

    def _part(self, number: int) -> ShardedPart:
        part = self.work.parts[number]
        assert part is not None, f"part {number} is not sharded"
        return part

    def _arrived(self) -> Tensor | None:
        message, self.arrived = self.arrived, None
        return message

    def _ends(self, unit: Unit) -> bool:
        return self.executor.program.ends(self.executor.stage, unit)
