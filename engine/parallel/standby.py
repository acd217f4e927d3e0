"""Ranks of a start that no layout uses (parallel.elastic): they wait, ready for the next start, until the job ends."""

import contextlib
import time

import torch.distributed as dist

from engine.waits import answer_of

_LEFT = "the job has ended"
_POLL_S = 1.0


class StoodBy(Exception):
    """This rank had nothing to do, and the job has ended."""


def stand_by(store: dist.Store) -> None:
    """Return when the ranks that work have ended, or their store has gone with its host."""
    with contextlib.suppress(RuntimeError):
        while not store.check([_LEFT]):
            time.sleep(_POLL_S)


def let_go(store: dist.Store) -> None:
    """Tell the ranks that stand by. Rank 0 only, at its end."""
    answer_of(lambda: store.set(_LEFT, ""), None)
