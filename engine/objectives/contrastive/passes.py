"""What a contrastive step does beside the units of its pipeline: captions, loss, and the rows on their way there."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.objectives.contrastive.distill.teachers import Teaching
from engine.objectives.contrastive.sigmoid import SigmoidLoss
from engine.objectives.contrastive.softmax import ContrastiveLoss
from engine.parallel.mesh import Mesh
from engine.parallel.rows import deal_from_first_stage, deal_from_last_stage, gather_rows
from engine.pipeline.executor import BackwardContext
from engine.pipeline.outputs import KeptOutputs
from engine.pipeline.program import Alone, Unit

LossResult = ContrastiveLoss | SigmoidLoss
Loss = Callable[[Tensor, Tensor], LossResult]
"""(image rows, text rows) of this rank -> global loss and the gradients of these rows."""


@dataclass(frozen=True, kw_only=True)
class Captions:
    """How a rank encodes the captions of its rows."""

    tower: Callable[[int, Tensor | None], Tensor]
    """part, and what `below` has answered -> embeddings [·, D], fp32."""
    below: Callable[[int], Tensor] | None
    """part -> packed tokens behind the blocks with nothing to train in them and below; None: there is none."""
    rows: list[slice]
    """This rank's own rows of the local batch, in parts for the tower."""
    backward: BackwardContext
    outputs: KeptOutputs
    keeps: bool
    """Whether they keep their activations."""

    stash: dict[int, Tensor | None] = field(default_factory=dict)
    """part -> what `below` has answered, until it is repeated."""

    def encode(self, turn: Alone) -> list[Tensor]:
        """Embeddings of a turn's parts, with their graphs where they keep them."""
        return [self._encode_part(part) for part in range(len(self.rows))[turn.parts(len(self.rows))]]

    def _encode_part(self, part: int) -> Tensor:
        with torch.no_grad():
            hidden = self.below(part) if self.below is not None else None
        if not self.keeps:
            self.stash[part] = hidden
        with torch.set_grad_enabled(self.keeps), self.outputs.leaving(part):
            return self.tower(part, hidden)

    def backprop(self, turn: Alone, embeddings: list[Tensor], gradient: Tensor) -> None:
        """Gradient [·, D] of this rank's rows -> gradients of the tower, the last part first; of a turn's parts.

        embeddings: of all parts, which a part takes its own from.
        """
        first = self.rows[0].start if self.rows else 0
        for part in range(len(self.rows))[::-1][turn.parts(len(self.rows))]:
            rows = slice(self.rows[part].start - first, self.rows[part].stop - first)
            with self.outputs.taking(part):
                embedding = embeddings.pop()
                if not self.keeps:
                    embedding = self.tower(part, self.stash.pop(part))
                with self.backward(part == 0):
                    torch.autograd.backward(embedding, gradient[rows])


@dataclass(kw_only=True)
class ContrastivePasses:
    """One step: embeddings in, gradients of embeddings out."""

    mesh: Mesh
    device: torch.device
    captions: Captions
    loss: Loss
    local_batch: int
    """b, pairs of the replica."""
    micro_batches: int
    embed_dim: int
    """D."""
    teaching: Teaching | None = None
    """What frozen teachers say, of a job that has some."""
    reads_features: bool = False
    """Whether the images' embeddings are read in the place of pixels."""
    features: Tensor | None = None
    """These embeddings, float32 [b, D] on the first stage."""

    def __post_init__(self) -> None:
        self._embeddings: list[Tensor] = []
        self._text_embeddings: list[Tensor] = []
        self._rows: tuple[Tensor, Tensor] | None = None
        self._image_gradients: tuple[Tensor, ...] = ()
        self._features: Tensor | None = None
        self.result: LossResult | None = None
        """The loss, once it is there."""

    def take(self, unit: Unit, output: Tensor) -> None:
        """Embeddings [M, D] of a micro-batch; they come in order."""
        self._embeddings.append(output)

    def gradient(self, unit: Unit) -> Tensor:
        """Gradient of a micro-batch's embeddings."""
        return self._image_gradients[unit.micro_batch]

    def alone(self, action: Alone) -> None:
        """The captions' way forward and back, and the teachers' work."""
        if action.span == "encode_text":
            self._text_embeddings += self.captions.encode(action)
        elif action.span == "teacher":
            assert self.teaching is not None
            self.teaching.teach()
        else:
            assert action.span == "backward_text" and self.result is not None
            self.captions.backprop(action, self._text_embeddings, self.result.grad_text)

    def together(self, span: str, number: int) -> None:
        """Pixels to the teachers, or features to their rows' owners; embeddings to theirs; the loss; gradients back to
        the last stage.
        """
        if span == "deal":
            self._deal_inputs()
        elif span == "loss":
            assert self._rows is not None
            self.result = self.loss(*self._rows)
        elif number == 0:
            self._rows = self._deal()
        else:
            assert self.result is not None
            gradient = gather_rows(self.result.grad_image, self.local_batch, self.mesh.replica)
            self._image_gradients = gradient.split(self.local_batch // self.micro_batches)

    def _deal_inputs(self) -> None:
        if self.teaching is not None:
            self.teaching.deal()
        if self.reads_features:
            shape, where = (self.embed_dim,), (self.mesh, self.device)
            self._features = deal_from_first_stage(self.features, self.local_batch, shape, *where, torch.float32)

    def _deal(self) -> tuple[Tensor, Tensor]:
        """(image rows, text rows) of this rank, [·, D] fp32 without graph."""
        mine = torch.cat(self._embeddings) if self._embeddings else None
        self._embeddings = []
        if self._features is not None:
            rows = self._features
        else:
            rows = deal_from_last_stage(mine, self.local_batch, self.embed_dim, self.mesh, self.device)
        own_text = [embedding.detach() for embedding in self._text_embeddings]
        return rows, torch.cat(own_text) if own_text else rows.new_empty(0, self.embed_dim)
