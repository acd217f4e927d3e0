"""The contrastive step on a pipeline: encode, loss, backprop (docs/contrastive_step.md). Nothing about ViTs in it.

The loss needs every embedding of the global batch before any gradient exists, so there is a barrier:
1. encode: each micro-batch runs through the stages without grad; a stage keeps ("stashes") its inputs only;
2. loss: exact, over the rows of all ranks, gradients of the embeddings in closed form; no graph crosses it;
3. backprop: each stage replays a micro-batch from its stash with grad and sends the input's gradient upstream.
The last k micro-batches may keep their activations and are not replayed: (4 - k / m) forwards of compute instead of 4.
Backprop goes from the last micro-batch to the first, whatever k: kept activations are freed first, and the sum of
gradients has the same order for every k.

Every rank also encodes captions of its own, where its stage would otherwise wait: before the first input arrives, and
before the first gradient does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from engine.objectives.contrastive.sigmoid import SigmoidLoss
from engine.objectives.contrastive.softmax import ContrastiveLoss
from engine.parallel.mesh import Mesh
from engine.parallel.rows import deal_from_last_stage, gather_rows
from engine.pipeline.clock import Phases
from engine.pipeline.links import Backward, Pipeline, Unit, forward_order
from engine.pipeline.outputs import KeptOutputs
from engine.pipeline.stash import DeviceStash, HostStash
from engine.pipeline.turns import Turns

VisionChunk = Callable[[Tensor | None, int], Tensor]
"""(chunk input, or None where the tower starts; micro-batch) -> chunk output; where it ends embeddings [M, D], fp32."""
TextTower = Callable[[int], Tensor]
"""part of this rank's captions -> embeddings [·, D], fp32."""
LossResult = ContrastiveLoss | SigmoidLoss
Loss = Callable[[Tensor, Tensor], LossResult]
"""(image rows, text rows) of this rank -> global loss and the gradients of these rows."""


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """Sizes of one step on this rank."""

    micro_batches: int
    """m of the replica."""
    local_batch: int
    """b, pairs of the replica."""
    embed_dim: int
    """D."""
    hidden: tuple[int, ...]
    """Shape of a message between stages."""
    dtype: torch.dtype
    """Dtype of the hidden tokens."""
    keep: int
    """k, micro-batches of this stage that keep their activations; ranks may differ."""
    keep_text: bool = False
    """The captions keep their activations, too."""
    offload_stash: bool = False
    """The stash is in host memory."""


@dataclass(kw_only=True)
class Work:
    """What a step runs on this rank."""

    vision: Sequence[VisionChunk]
    """The chunks of this rank, in tower order."""
    vision_backward: Sequence[Backward]
    """One a chunk."""
    vision_outputs: Sequence[KeptOutputs]
    """Kept outputs of products, one a chunk."""
    text: TextTower
    text_rows: list[slice]
    """This rank's own rows of the local batch, in parts for the text tower."""
    text_backward: Backward
    text_outputs: KeptOutputs
    loss: Loss
    turns: Turns
    """Turns of the chunks, in tower order, and of the captions, who come last."""


@dataclass(frozen=True)
class _Turn:
    """Units of one chunk in a row, or the captions."""

    part: int
    units: list[Unit]


def _turns(units: Sequence[Unit], *, text: int, text_first: bool) -> list[tuple[_Turn, int | None]]:
    """Turns in order, each with the part that follows. text: number of the captions' part."""
    chunks = [_Turn(chunk, list(run)) for chunk, run in groupby(units, key=lambda unit: unit.chunk)]
    captions = _Turn(text, [])
    turns = [captions, *chunks] if text_first else [*chunks, captions]
    return list(zip(turns, [*(turn.part for turn in turns[1:]), None], strict=True))


class ContrastiveSchedule:
    """Runs steps of one shape."""

    def __init__(self, mesh: Mesh, shape: StepShape, device: torch.device, chunks: int = 1, group: int | None = None):
        """chunks: v of this rank; group: G, micro-batches that a chunk works in a row (`forward_order`)."""
        self.mesh, self.shape, self.device = mesh, shape, device
        self.pipeline = Pipeline(mesh, chunks, shape.hidden, shape.dtype, device)
        self.units = forward_order(shape.micro_batches, mesh.pipeline.size, chunks, group)
        self.stash = HostStash(device) if shape.offload_stash else DeviceStash()

    def run(self, work: Work, phases: Phases) -> LossResult:
        """One step; gradients are left in the parameters. Collective over the mesh."""
        step = _Step(self, work, phases)
        image_rows, text_rows = step.encode()
        step.expect()
        with phases.time("loss"):
            result = work.loss(image_rows, text_rows)
        with phases.time("exchange"):
            image_gradient = gather_rows(result.grad_image, self.shape.local_batch, self.mesh.replica)
        step.backprop(image_gradient, result.grad_text)
        return result


@dataclass
class _Step:
    """State of one step: what was kept of micro-batches that are not replayed, and the captions' embeddings."""

    schedule: ContrastiveSchedule
    work: Work
    phases: Phases
    kept: dict[Unit, tuple[Tensor | None, Tensor]] = field(default_factory=dict)
    """Input and output of a chunk, with the graph between them."""
    text_embeddings: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shape, self.mesh = self.schedule.shape, self.schedule.mesh
        self.text = len(self.work.vision)
        self.pipeline, self.units, self.stash = self.schedule.pipeline, self.schedule.units, self.schedule.stash

    # --- phase 1 -------------------------------------------------------------------------------------------------

    def encode(self) -> tuple[Tensor, Tensor]:
        """(image rows, text rows) of this rank, [·, D] fp32 without graph."""
        inbox = self.pipeline.forward_inbox(self.units)
        self._ask_for_text()
        embeddings = []
        # Captions are encoded where the stage would otherwise wait.
        for turn, then in _turns(self.units, text=self.text, text_first=not self.mesh.is_first_stage):
            with self.work.turns.encoding(turn.part, then):
                if turn.part == self.text:
                    self._encode_text()
                for unit in turn.units:
                    output = self._encode_unit(unit, inbox)
                    if self.pipeline.ends(unit):
                        embeddings.append(output)
        shape = self.shape
        with self.phases.time("exchange"):
            self.pipeline.next.drain()
            mine = torch.cat(embeddings) if embeddings else None
            rows = deal_from_last_stage(mine, shape.local_batch, shape.embed_dim, self.mesh, self.schedule.device)
        own_text = [embedding.detach() for embedding in self.text_embeddings]
        return rows, torch.cat(own_text) if own_text else rows.new_empty(0, shape.embed_dim)

    def _encode_unit(self, unit: Unit, inbox) -> Tensor:
        hidden = None if self.pipeline.starts(unit) else self._receive(inbox)
        keep = unit.micro_batch >= self.shape.micro_batches - self.shape.keep
        leaving = self.work.vision_outputs[unit.chunk].leaving(unit.micro_batch)
        with self.phases.time("encode", unit), torch.set_grad_enabled(keep), leaving:
            if keep and hidden is not None:
                hidden.requires_grad_()
            output = self.work.vision[unit.chunk](hidden, unit.micro_batch)
        if keep:
            self.kept[unit] = hidden, output
        else:
            self.stash.push(hidden)
        if not self.pipeline.ends(unit):
            self.pipeline.next.send(output)
        return output.detach()

    def _encode_text(self) -> None:
        with self.phases.time("encode_text"), torch.set_grad_enabled(self.shape.keep_text):
            self.text_embeddings = [self._encode_part(part) for part in range(len(self.work.text_rows))]

    def _encode_part(self, part: int) -> Tensor:
        with self.work.text_outputs.leaving(part):
            return self.work.text(part)

    # --- phase 3 -------------------------------------------------------------------------------------------------

    def backprop(self, image_gradient: Tensor, text_gradient: Tensor) -> None:
        """Gradients of the embeddings (local batch; this rank's captions) -> gradients of all parameters."""
        micro = image_gradient.split(self.shape.local_batch // self.shape.micro_batches)
        inbox = self.pipeline.backward_inbox(self.units)
        self.stash.prefetch()
        for turn, then in self._backward_turns():
            with self.work.turns.training(turn.part, then):
                if turn.part == self.text:
                    self._backprop_text(text_gradient)
                for unit in turn.units:
                    with self.work.vision_outputs[unit.chunk].taking(unit.micro_batch):
                        self._backprop_unit(unit, inbox, micro[unit.micro_batch])
        self.work.turns.settle()
        self.pipeline.previous.drain()

    def _backward_turns(self) -> "list[tuple[_Turn, int | None]]":
        return _turns(self.units[::-1], text=self.text, text_first=not self.mesh.is_last_stage)

    def expect(self) -> None:
        """Ask for what backprop needs first, before the loss."""
        self._ask_for_text()
        self.work.turns.expect(self._backward_turns()[0][0].part)

    def _ask_for_text(self) -> None:
        """Ask on all ranks: on a pipeline some have the captions' turn first, and others last."""
        if self.mesh.pipeline.size > 1:
            self.work.turns.ask_for(self.text)

    def _backprop_unit(self, unit: Unit, inbox, embedding_gradient: Tensor) -> None:
        hidden, output = self.kept.pop(unit) if unit in self.kept else self._replay(unit)
        gradient = embedding_gradient if self.pipeline.ends(unit) else self._receive(inbox)
        is_last = unit.micro_batch == 0  # of this chunk: units come in reverse order
        if is_last:
            self.work.turns.settle()
        with self.phases.time("backward", unit), self.work.vision_backward[unit.chunk](is_last):
            torch.autograd.backward(output, gradient)
        if hidden is not None:
            assert hidden.grad is not None
            self.pipeline.previous.send(hidden.grad)

    def _replay(self, unit: Unit) -> tuple[Tensor | None, Tensor]:
        """(input, output) of a stashed unit, with graph. Needs nothing from upstream: runs while a gradient travels."""
        with self.phases.time("replay", unit):
            hidden = self.stash.pop()
            if hidden is not None:
                hidden.requires_grad_()
            return hidden, self.work.vision[unit.chunk](hidden, unit.micro_batch)

    def _backprop_text(self, gradient: Tensor) -> None:
        parts = self.work.text_rows
        first = parts[0].start if parts else 0
        with self.phases.time("backward_text"):
            for part in reversed(range(len(parts))):
                rows = slice(parts[part].start - first, parts[part].stop - first)
                with self.work.text_outputs.taking(part):
                    embedding = self.text_embeddings[part] if self.shape.keep_text else self.work.text(part)
                    with self.work.text_backward(part == 0):
                        torch.autograd.backward(embedding, gradient[rows])
        self.text_embeddings = []

    def _receive(self, inbox) -> Tensor:
        with self.phases.time("wait"):
            return inbox.receive()
