"""A chunk of layers that runs some micro-batches and answers the others with tensors of the same shape and weight."""

from typing import Any

import torch
from torch import Tensor

from engine.pipeline.executor import Chunk
from engine.pipeline.program import Unit
from tools.dryrun.memory import rounded
from tools.dryrun.recorder import Recorder


class FoldedChunk:
    """Stand-in for a chunk in a step's work; see Folding."""

    def __init__(self, chunk: Chunk, number: int, recorder: Recorder, *, divided: bool = False):
        """number: of the chunk on this rank. divided: what it takes was made in the same unit (`FoldedBelow`)."""
        self.chunk, self.number, self.recorder, self.divided = chunk, number, recorder, divided
        self._shape, self._dtype = torch.Size(), torch.float32
        self._left: dict[int, Tensor] = {}
        """Micro-batch -> as much memory as one like it leaves behind for its replay (kept outputs)."""

    def __call__(self, hidden: Tensor | None, micro_batch: int) -> Tensor:
        """Chunk input -> chunk output, in the graph where gradients are on."""
        if self.recorder.folding.runs(micro_batch):
            output = self.chunk(hidden, micro_batch)
            self._shape, self._dtype = output.shape, output.dtype
            return output
        output = torch.empty(self._shape, dtype=self._dtype)
        self._left.pop(micro_batch, None)
        left_bytes = self.recorder.left_bytes(Unit(self.number, micro_batch)) - rounded(output.nbytes)
        if self.divided and hidden is not None and self.recorder.memory.phase == "encode":
            left_bytes -= rounded(hidden.nbytes)
        if not torch.is_grad_enabled():
            self._left[micro_batch] = torch.empty(max(0, left_bytes), dtype=torch.uint8)
            return output
        source = torch.empty(0, requires_grad=True) if hidden is None or not hidden.requires_grad else hidden
        return _StandIn.apply(source, output, max(0, left_bytes))


class FoldedBelow:
    """The same for the blocks of a chunk below what is trained, whose output waits for the replay."""

    def __init__(self, below: Chunk, recorder: Recorder):
        self.below, self.recorder = below, recorder
        self._shape, self._dtype = torch.Size(), torch.float32

    def __call__(self, hidden: Tensor | None, micro_batch: int) -> Tensor:
        """Chunk input -> what the chunk goes on from."""
        if not self.recorder.folding.runs(micro_batch):
            return torch.empty(self._shape, dtype=self._dtype)
        output = self.below(hidden, micro_batch)
        self._shape, self._dtype = output.shape, output.dtype
        return output


class _StandIn(torch.autograd.Function):
    """source -> output, and so many bytes that live until the backward, as the activations of a stage do."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, output: Tensor, held_bytes: int) -> Tensor:
        """Autograd's forward."""
        ctx.save_for_backward(source, torch.empty(held_bytes, dtype=torch.uint8))
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None, None]:
        """A gradient of the source."""
        return torch.empty_like(ctx.saved_tensors[0]), None, None
