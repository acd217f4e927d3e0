"""Failing together: what one rank finds out, all ranks raise, so that none waits for another in a collective."""

import torch.distributed as dist

from engine.checkpoint.format.errors import CheckpointError
from engine.parallel.mesh import Axis


def everyone(value: object, axis: Axis) -> list:
    """The values of all ranks, in rank order. Collective."""
    values: list = [None] * axis.size
    dist.all_gather_object(values, value, group=axis.group)
    return values


def raise_together(error: str | None, axis: Axis) -> None:
    """Raise CheckpointError on every rank if any rank has an error. Collective."""
    errors = [e for e in everyone(error, axis) if e]
    if errors:
        raise CheckpointError(errors[0])
