"""What a step of masked-feature distillation does beside the units of its pipeline: teaching, and the loss's sum."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.objectives.mim.exchange import collect_targets
from engine.objectives.mim.student import MaskedBatch, StudentRunner
from engine.objectives.mim.teacher import Teacher
from engine.parallel.mesh import Mesh
from engine.parallel.rows import deal_from_first_stage, own_rows, split_rows
from engine.pipeline.program import Alone, Unit


@dataclass(kw_only=True)
class MimPasses:
    """One step: images in, shares of the loss out, which are where backwards begin."""

    mesh: Mesh
    device: torch.device
    teacher: Teacher
    student: Sequence[StudentRunner]
    batch: MaskedBatch
    """The local batch, to which `together` adds the targets."""

    def __post_init__(self) -> None:
        self._rows = len(self.batch.masked)
        self._dealt: Tensor | None = None
        self._features: Tensor | None = None
        self.loss = torch.zeros((), device=self.device)
        """Sum of the loss shares on the last stage, 0 elsewhere; 0-d."""

    def take(self, unit: Unit, output: Tensor) -> None:
        """A micro-batch's share of the global loss, 0-d fp32."""
        self.loss += output

    def gradient(self, unit: Unit) -> None:
        """A loss wants none."""
        return None

    def alone(self, action: Alone) -> None:
        """Teach this rank's images of the local batch."""
        assert action.span == "teacher" and self._dealt is not None
        self._features = self.teacher.targets(self._dealt, self.batch.masked[own_rows(self._rows, self.mesh)])

    def together(self, span: str, number: int) -> None:
        """Images to every rank of the replica; targets to its last stage, and the batch to the student."""
        if number == 0:
            side = self.student[0].tower.vision.image_size
            self._dealt = deal_from_first_stage(self.batch.images, self._rows, (3, side, side), self.mesh, self.device)
        else:
            self._show()

    def _show(self) -> None:
        assert self._features is not None
        parts = split_rows(self._rows, self.mesh.replica.size)
        counts = [int(self.batch.masked[part].sum()) for part in parts]
        shown = replace(self.batch, targets=collect_targets(self._features, counts, self.mesh))
        self._dealt = self._features = None
        for runner in self.student:
            runner.batch = shown
