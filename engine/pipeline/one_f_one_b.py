"""The pipeline schedule of a loss that needs no barrier: one forward, one backward in turn (1F1B).

A stage runs as many forwards ahead as stages lie behind it, then takes a backward for every forward: it never holds the
activations of more than P micro-batches, where all forwards first would hold m. With v chunks a rank (interleaved
1F1B) it runs 2 (P - 1 - stage) + (v - 1) P units ahead, and the bubble shrinks from (P - 1) / m of the work to
(P - 1) / (v m). Source: Narayanan et al. 2021 (arXiv 2104.04473), sections 2.2.1 and 2.2.2.

Receives are posted one message ahead and sends are not waited for, in both directions at once. Every rank takes its
forwards, and its backwards, in the order of all others, so messages arrive in the order in which they are wanted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.parallel.mesh import Mesh
from engine.pipeline.clock import Phases
from engine.pipeline.links import Backward, Inbox, Pipeline, Unit, forward_order
from engine.pipeline.outputs import KeptOutputs

Chunk = Callable[[Tensor | None, int], Tensor]
"""(chunk input, or None where the tower starts; micro-batch) -> chunk output; where it ends its share of the loss."""


@dataclass(frozen=True)
class Turn:
    """What a rank does next."""

    unit: Unit
    is_forward: bool


def turns(micro_batches: int, *, stages: int, stage: int, chunks: int) -> list[Turn]:
    """Everything that stage `stage` does in a step, in order. Chunks > 1 need micro-batches in multiples of stages."""
    units = forward_order(micro_batches, stages, chunks)
    forwards = [Turn(unit, True) for unit in units]
    # Gradients come back from the end of the tower: the same order with the chunks reversed.
    backwards = [Turn(Unit(chunks - 1 - unit.chunk, unit.micro_batch), False) for unit in units]
    behind = stages - 1 - stage
    ahead = min(len(units), behind if chunks == 1 else 2 * behind + (chunks - 1) * stages)
    pairs = zip(forwards[ahead:], backwards, strict=False)
    return [*forwards[:ahead], *(turn for pair in pairs for turn in pair), *backwards[len(units) - ahead :]]


class OneForwardOneBackward:
    """Runs steps of one shape."""

    def __init__(
        self,
        mesh: Mesh,
        *,
        micro_batches: int,
        chunks: int,
        hidden: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ):
        """micro_batches: of the replica; hidden, dtype: a message between stages."""
        self.micro_batches, self.device = micro_batches, device
        self.pipeline = Pipeline(mesh, chunks, hidden, dtype, device)
        self.turns = turns(micro_batches, stages=mesh.pipeline.size, stage=mesh.pipeline.rank, chunks=chunks)

    def run(
        self, chunks: Sequence[Chunk], backward: Sequence[Backward], outputs: Sequence[KeptOutputs], phases: Phases
    ) -> Tensor:
        """One step of this rank's chunks, in tower order, with a `backward` and kept outputs for each.

        Collective over the pipeline.

        Gradients are left in the parameters. Returns the sum of the loss shares on the last stage, 0 elsewhere (0-d).
        """
        units = [turn.unit for turn in self.turns if turn.is_forward]
        step = _Step(
            self,
            chunks,
            backward,
            outputs,
            phases,
            inputs_from=self.pipeline.forward_inbox(units),
            gradients_from=self.pipeline.backward_inbox(units),
        )
        for turn in self.turns:
            if turn.is_forward:
                step.forward(turn.unit)
            else:
                step.backward(turn.unit)
        self.pipeline.next.drain()
        self.pipeline.previous.drain()
        return step.loss


@dataclass
class _Step:
    """State of one step: what the micro-batches in flight came in as and went out as."""

    schedule: OneForwardOneBackward
    chunks: Sequence[Chunk]
    contexts: Sequence[Backward]
    outputs: Sequence[KeptOutputs]
    phases: Phases
    inputs_from: Inbox
    gradients_from: Inbox
    in_flight: dict[Unit, tuple[Tensor | None, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pipeline = self.schedule.pipeline
        self.loss = torch.zeros((), device=self.schedule.device)

    def forward(self, unit: Unit) -> None:
        hidden = None if self.pipeline.starts(unit) else self._receive(self.inputs_from).requires_grad_()
        with self.phases.time("forward", unit), self.outputs[unit.chunk].leaving(unit.micro_batch):
            output = self.chunks[unit.chunk](hidden, unit.micro_batch)
        self.in_flight[unit] = hidden, output
        if self.pipeline.ends(unit):
            self.loss += output.detach()
        else:
            self.pipeline.next.send(output)

    def backward(self, unit: Unit) -> None:
        hidden, output = self.in_flight.pop(unit)
        gradient = None if self.pipeline.ends(unit) else self._receive(self.gradients_from)
        is_last = unit.micro_batch == self.schedule.micro_batches - 1  # of this chunk: backwards come in order
        taking = self.outputs[unit.chunk].taking(unit.micro_batch)
        with self.phases.time("backward", unit), self.contexts[unit.chunk](is_last), taking:
            torch.autograd.backward(output, gradient)
        if hidden is not None:
            assert hidden.grad is not None
            self.pipeline.previous.send(hidden.grad)

    def _receive(self, inbox: Inbox) -> Tensor:
        with self.phases.time("wait"):
            return inbox.receive()
