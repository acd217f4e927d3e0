"""Whole logical tensors from the slices and shards of all ranks, for tests that compare layouts."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.feed import LocalBatch
from engine.objectives.contrastive.passes import Loss, LossResult
from engine.objectives.contrastive.step import ContrastiveStep
from engine.parallel.mesh import Axis
from engine.pipeline.clock import Phases
from engine.trainer import Trainer
from models.tensors.naming import LogicalTensor

COPIES_AGREE = 1e-5
"""Relative difference allowed between ranks that hold the same part: sums in another order."""
EMPTY = torch.empty(0)


@dataclass(frozen=True)
class _Part:
    """Elements [start, start + len(values)) of the flattened slice of tensor rank `rank`."""

    tensor: LogicalTensor
    rank: int
    start: int
    values: Tensor


def whole_weights(trainer: Trainer) -> dict[str, Tensor]:
    """Every weight of the model, on rank 0 (elsewhere empty). Collective; copies on several ranks must agree."""
    with trainer.towers.whole_weights():
        parts = [
            _Part(tensor, _slice_rank(tensor, trainer), 0, parameter.detach().float().flatten().clone())
            for tensor, parameter in trainer.towers.logical_parameters()
        ]
    return _assemble(trainer, parts)


def whole_gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Every gradient of the model after the reduction, on rank 0 (elsewhere empty). Collective."""
    return _assemble(trainer, list(_owned(trainer)))


def contrastive_step(trainer: Trainer) -> ContrastiveStep:
    """The step of a trainer whose objective is contrastive."""
    step = trainer.training_step
    assert isinstance(step, ContrastiveStep)
    return step


def backward_only(step: ContrastiveStep, batch: LocalBatch, loss: Loss | None = None) -> LossResult:
    """A step that ends before the optimizer: gradients are complete on the ranks that own them. Collective."""
    result = step.gradients(batch, Phases(), loss)
    step.update.reduce()
    return result


def gather_objects(own: Any, axis: Axis) -> list[Any]:
    """On the first rank of the axis what every rank gave, in its order; empty elsewhere."""
    everyone: list[Any] = [None] * axis.size if axis.rank == 0 else []
    dist.gather_object(own, everyone or None, group=axis.group, group_dst=0)
    return everyone


def _owned(trainer: Trainer) -> Iterator[_Part]:
    for tower in trainer.optimizer.towers:
        for shard in tower.shards.shards:
            for piece in shard.pieces:
                tensor = tower.shards.tensors[piece.tensor]
                values = shard.gradient[piece.start : piece.stop].clone()
                yield _Part(tensor, _slice_rank(tensor, trainer), piece.offset, values)


def _slice_rank(tensor: LogicalTensor, trainer: Trainer) -> int:
    return trainer.mesh.tensor.rank if tensor.split_dim is not None else 0


def _assemble(trainer: Trainer, own: list[_Part]) -> dict[str, Tensor]:
    size = trainer.mesh.tensor.size
    whole: dict[str, Tensor] = {}
    slices: dict[tuple[LogicalTensor, int], Tensor] = {}
    for part in chain.from_iterable(map(_apart, gather_objects(_together(own), trainer.mesh.world))):
        tensor = part.tensor
        if tensor.name not in whole:
            whole[tensor.name] = torch.full(tensor.shape, torch.nan)
        if (tensor, part.rank) not in slices:
            elements = whole[tensor.name][tensor.slice_of(part.rank, size)].numel()
            slices[tensor, part.rank] = torch.full((elements,), torch.nan)
        flat = slices[tensor, part.rank]
        _put(flat[part.start : part.start + len(part.values)], part.values, tensor.name)
    for (tensor, rank), flat in slices.items():
        piece = whole[tensor.name][tensor.slice_of(rank, size)]
        piece.copy_(flat.view(piece.shape))
    missing = [name for name, value in whole.items() if value.isnan().any()]
    assert not missing, f"no rank holds parts of {missing[:3]}"
    return whole


def _together(parts: list[_Part]) -> tuple[list[_Part], list[int], Tensor]:
    """The parts without values, how many each has, all values: one tensor travels faster than a hundred."""
    values = [part.values for part in parts]
    return [replace(part, values=EMPTY) for part in parts], list(map(len, values)), torch.cat([EMPTY, *values])


def _apart(sent: tuple[list[_Part], list[int], Tensor]) -> list[_Part]:
    parts, sizes, values = sent
    return [replace(part, values=own) for part, own in zip(parts, values.split(sizes), strict=True)]


def _put(target: Tensor, values: Tensor, name: str) -> None:
    if torch.equal(target, values):  # as most copies are
        return
    known = ~target.isnan()
    if known.any():
        difference = (target[known] - values[known]).norm() / values.norm().clamp_min(1e-30)
        assert difference <= COPIES_AGREE, f"copies of {name} on two ranks differ by {float(difference):.1e}"
    target.copy_(values)
