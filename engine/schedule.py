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

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.loss import ContrastiveLoss
from engine.mesh import Mesh
from engine.p2p import StageLink
from engine.rows import deal_from_last_stage, gather_rows

VisionStage = Callable[[Tensor | None, int], Tensor]
"""(stage input or None on the first stage, micro-batch) -> stage output; on the last stage embeddings [M, D], fp32."""
TextTower = Callable[[int], Tensor]
"""chunk of this rank's captions -> embeddings [·, D], fp32."""
Loss = Callable[[Tensor, Tensor], ContrastiveLoss]
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
    """Its dtype."""
    keep: int
    """k, micro-batches that keep their activations."""


@dataclass
class Phases:
    """Wall seconds of the phases of one step on this rank (CPU clock: on a GPU the launches, unless synchronised)."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, name: str):
        """Add the block's time to phase `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class ContrastiveSchedule:
    """Runs steps of one shape; holds the stash during a step."""

    def __init__(self, mesh: Mesh, shape: StepShape, device: torch.device):
        self.mesh, self.shape, self.device = mesh, shape, device
        link = lambda neighbour: StageLink(mesh.pipeline, neighbour, shape.hidden, shape.dtype, device)  # noqa: E731
        self.previous = None if mesh.is_first_stage else link(mesh.pipeline.rank - 1)
        self.next = None if mesh.is_last_stage else link(mesh.pipeline.rank + 1)

    def run(
        self, vision: VisionStage, text: TextTower, text_chunks: list[slice], loss: Loss
    ) -> tuple[ContrastiveLoss, Phases]:
        """One step; gradients are left in the parameters. text_chunks: this rank's own rows, cut for the text tower."""
        phases = Phases()
        step = _Step(self, vision, text, text_chunks, phases)
        image_rows, text_rows = step.encode()
        with phases.time("loss"):
            result = loss(image_rows, text_rows)
            image_gradient = gather_rows(result.grad_image, self.shape.local_batch, self.mesh.replica)
        step.backprop(image_gradient, result.grad_text)
        return result, phases


class _Step:
    """State of one step: the stash, and the captions' embeddings."""

    def __init__(
        self, schedule: ContrastiveSchedule, vision: VisionStage, text: TextTower, text_chunks, phases: Phases
    ):
        self.mesh, self.shape, self.device = schedule.mesh, schedule.shape, schedule.device
        self.previous, self.next = schedule.previous, schedule.next
        self.vision, self.text, self.text_chunks, self.phases = vision, text, text_chunks, phases
        self.inputs: list[Tensor | None] = []
        self.kept: dict[int, Tensor] = {}
        self.text_embeddings: list[Tensor] = []

    # --- phase 1 ---------------------------------------------------------------------------------------------------

    def encode(self) -> tuple[Tensor, Tensor]:
        """(image rows, text rows) of this rank, [·, D] fp32 without graph."""
        if self.previous:
            self.previous.post_receive()
            self._encode_text()
        outputs = [self._encode_micro_batch(i) for i in range(self.shape.micro_batches)]
        if not self.previous:
            self._encode_text()
        embeddings = torch.cat(outputs) if self.mesh.is_last_stage else None
        with self.phases.time("exchange"):
            if self.next:
                self.next.drain()
            shape = self.shape
            image_rows = deal_from_last_stage(embeddings, shape.local_batch, shape.embed_dim, self.mesh, self.device)
        own_text = [embedding.detach() for embedding in self.text_embeddings]
        return image_rows, torch.cat(own_text) if own_text else image_rows.new_empty(0, shape.embed_dim)

    def _encode_micro_batch(self, i: int) -> Tensor:
        hidden = self._receive(self.previous, is_last=i == self.shape.micro_batches - 1) if self.previous else None
        keep = i >= self.shape.micro_batches - self.shape.keep
        with self.phases.time("encode"), torch.set_grad_enabled(keep):
            if keep and hidden is not None:
                hidden.requires_grad_()
            output = self.vision(hidden, i)
        self.inputs.append(hidden)
        if keep:
            self.kept[i] = output
        if self.next:
            self.next.send(output)
        return output.detach()

    def _encode_text(self) -> None:
        with self.phases.time("encode_text"), torch.set_grad_enabled(self._keeps_text):
            self.text_embeddings = [self.text(chunk) for chunk in range(len(self.text_chunks))]

    @property
    def _keeps_text(self) -> bool:
        return self.shape.keep == self.shape.micro_batches

    # --- phase 3 ---------------------------------------------------------------------------------------------------

    def backprop(self, image_gradient: Tensor, text_gradient: Tensor) -> None:
        """Gradients of the embeddings (local batch; this rank's captions) -> gradients of all parameters."""
        micro = image_gradient.split(self.shape.local_batch // self.shape.micro_batches)
        if self.next:
            self.next.post_receive()
            self._backprop_text(text_gradient)
        for i in reversed(range(self.shape.micro_batches)):
            self._backprop_micro_batch(i, micro[i])
        if not self.next:
            self._backprop_text(text_gradient)
        if self.previous:
            self.previous.drain()

    def _backprop_micro_batch(self, i: int, embedding_gradient: Tensor) -> None:
        hidden, output = self.inputs.pop(), self.kept.pop(i, None)
        if output is None:
            with self.phases.time("replay"):  # needs nothing from upstream: it runs while the gradient travels
                output = self.vision(hidden.requires_grad_() if hidden is not None else None, i)
        gradient = self._receive(self.next, is_last=i == 0) if self.next else embedding_gradient
        with self.phases.time("backward"):
            torch.autograd.backward(output, gradient)
        if self.previous:
            assert hidden is not None and hidden.grad is not None
            self.previous.send(hidden.grad)

    def _backprop_text(self, gradient: Tensor) -> None:
        first = self.text_chunks[0].start if self.text_chunks else 0
        with self.phases.time("backward_text"):
            for chunk in reversed(range(len(self.text_chunks))):
                rows = self.text_chunks[chunk]
                embedding = self.text_embeddings[chunk] if self._keeps_text else self.text(chunk)
                torch.autograd.backward(embedding, gradient[rows.start - first : rows.stop - first])
        self.text_embeddings = []

    def _receive(self, link: StageLink, *, is_last: bool) -> Tensor:
        """The message of this micro-batch; the next one is asked for before this one is worked on."""
        with self.phases.time("wait"):
            message = link.receive()
        if not is_last:
            link.post_receive()
        return message
