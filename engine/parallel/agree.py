"""Failing together: what one rank finds out, all ranks raise, so that none waits for another in a collective."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from data.errors import DataError
from engine.checkpoint.format.errors import CheckpointError
from engine.parallel.mesh import Axis


def everyone(value: object, axis: Axis) -> list:
    """The values of all ranks, in rank order. Collective."""
    if axis.size == 1:
        return [value]
    values: list = [None] * axis.size
    dist.all_gather_object(values, value, group=axis.group)
    return values


class PeerFailed(Exception):
    """Another rank failed for a reason that is not one of ours; it says itself which."""


def raise_together(error: Exception | str | None, axis: Axis) -> None:
    """Raise the first rank's error on every rank if any has one. Collective.

    error: what this rank ran into; a text is a CheckpointError. Where the first error is neither a DataError nor a
    CheckpointError, the others raise PeerFailed.
    """
    kind = DataError if isinstance(error, DataError) else CheckpointError
    ours = error is None or isinstance(error, str | DataError | CheckpointError)
    told = everyone((kind.__name__ if ours else "", str(error)) if error else None, axis)
    first = next((rank for rank, problem in enumerate(told) if problem), None)
    if first is None:
        return
    if axis.rank == first and isinstance(error, Exception):
        raise error
    name, text = told[first]
    raise {"DataError": DataError, "CheckpointError": CheckpointError}.get(name, PeerFailed)(text)


@contextmanager
def together(axis: Axis) -> Iterator[None]:
    """What any rank raises inside, all raise at the end. Collective; the block itself must hold no collective."""
    error = None
    try:
        yield
    except Exception as problem:
        error = problem
    raise_together(error, axis)
