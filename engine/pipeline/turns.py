"""Turns of the parts of a rank: chunks of the vision tower and the captions' side, one after the other.

A part's weights are gathered while the part before it works and leave behind its turn; its gradients are reduced while
the part after it works. So at most two chunks are whole at any time. Parts that are not sharded are always there.

The captions, the last part, are shared by all ranks, whose stages take their turn at different times: no rank may wait
for the others there. On a pipeline their weights are asked for by every rank at once, ahead of both phases, and their
gradients are whole until the step's end.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from engine.parallel.sharded import ShardedPart


class Turns:
    """Whose turn it is on this rank. Collective over the owners of the parts."""

    def __init__(self, parts: Sequence[ShardedPart | None], *, ahead: bool):
        """parts: those of the rank, None for one that is not sharded. ahead: gather for the next turn during this."""
        self.parts, self.ahead = parts, ahead
        self._reducing: ShardedPart | None = None

    @contextmanager
    def encoding(self, part: int, then: int | None) -> Iterator[None]:
        """Part number `part` runs forward in the block; the turn after it is that of `then`."""
        self._begin(part, then)
        yield
        self._end(part)

    @contextmanager
    def training(self, part: int, then: int | None) -> Iterator[None]:
        """Part number `part` runs backward in the block, all of it."""
        self._begin(part, then)
        mine = self.parts[part]
        if mine is not None:
            mine.open_gradients()
        yield
        self._end(part)
        if mine is not None and part != len(self.parts) - 1:
            self.settle()
            self._reducing = mine

    def settle(self) -> None:
        """Finish the reduction that the turn before has left under way: no other may begin in its group."""
        if self._reducing is not None:
            self._reducing.finish()
            self._reducing = None

    def expect(self, part: int) -> None:
        """Something else runs now, and then it is the turn of `part`."""
        if self.ahead:
            self.ask_for(part)

    def ask_for(self, part: int) -> None:
        """Start to gather a part."""
        asked = self.parts[part]
        if asked is not None:
            asked.gather()

    def _begin(self, part: int, then: int | None) -> None:
        mine = self.parts[part]
        if mine is not None:
            mine.wait()
        if then is not None and then != part:
            self.expect(then)

    def _end(self, part: int) -> None:
        mine = self.parts[part]
        if mine is not None:
            mine.release()
