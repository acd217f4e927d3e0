"""What the optimizer keeps of the elements that a rank owns, by kind, as checkpoints read and write it."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.checkpoint.format.manifest import AVERAGE, WEIGHT
from engine.config.read import OptimConfig
from engine.optim.groups import TensorGroup
from engine.optim.passes import Tally, total, words_of
from engine.parallel.shards import TowerShards


class OwnedState:
    """The state of one tower on this rank. Every list has one 1-D fp32 tensor a shard."""

    def __init__(
        self, shards: TowerShards, groups: list[TensorGroup], moments: tuple[str, ...], *, trained: bool = True
    ):
        """groups: of each tensor. moments: kinds of state that the rule keeps beside the weights; they start at 0.

        trained: False for weights that lie there as they are, in the model's dtype, without moments and average.
        """
        self.shards = shards
        self.groups = groups
        self.began = [0] * len(groups)
        """Updates of the job before the moments of each tensor saw one: above 0 where it was frozen at first."""
        weights = [shard.weight for shard in shards.shards]
        # fp32 weights are their own masters; lower precisions keep an fp32 copy of the owned elements.
        self.master = [w.float() if trained and w.dtype != torch.float32 else w for w in weights]
        self.moments = {kind: [torch.zeros_like(w) for w in self.master] for kind in moments}
        self.average: list[Tensor] = []
        """Moving average of the master weights; empty where none is kept (engine/optim/average.py)."""
        self.sums: Sums | None = None
        """Where an update leaves sums of bits; None: nobody wants them."""
        self._words: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        """Kind -> its tensors, and the same as integers."""

    def kinds(self) -> dict[str, list[Tensor]]:
        """Kind, as checkpoints name it -> its tensors, one a shard; what is not kept is not there."""
        held = {WEIGHT: self.master, **self.moments, AVERAGE: self.average}
        return {kind: flats for kind, flats in held.items() if flats}

    def tallies(self, kind: str) -> list[Tally]:
        """What sums a kind of state while a pass goes over it, one a shard, if anybody wants sums."""
        flats, wanted = self.kinds().get(kind, []), self.sums is not None
        return [
            Tally(flat, words, wanted=wanted) for flat, words in zip(flats, self._words_of(kind, flats), strict=True)
        ]

    def _words_of(self, kind: str, flats: list[Tensor]) -> list[Tensor]:
        """Made once: it costs what summing half a megabyte costs."""
        known, words = self._words.get(kind, ([], []))
        if [id(flat) for flat in known] != [id(flat) for flat in flats]:
            words = [words_of(flat) for flat in flats]
            self._words[kind] = list(flats), words
        return words

    def written(self, kind: str, tallies: list[Tally]) -> None:
        """All shards of a kind are what the update makes of them."""
        if self.sums is not None and tallies:
            self.sums.written[kind] = total(tallies)

    @contextmanager
    def changes(self, shard: int, part: slice) -> Iterator[None]:
        """A few master weights change inside the block, after the update has summed them."""
        known = self.sums.written.get(WEIGHT) if self.sums is not None else None
        near = words_of(self.master[shard], part)
        before = near.sum(dtype=torch.int64)
        yield
        if known is not None:
            known += near.sum(dtype=torch.int64) - before

    def sums_of_bits(self, kinds: Collection[str] | None = None) -> dict[str, Tensor]:
        """Kind -> sum of its bits, 0-d. kinds: those to be read; all by default."""
        return {
            kind: torch.stack([words.sum(dtype=torch.int64) for words in self._words_of(kind, flats)]).sum()
            for kind, flats in self.kinds().items()
            if kinds is None or kind in kinds
        }


@dataclass
class Sums:
    """Sums of bits, 0-d, of the kinds of state that an update sums on its way, when they are near a core anyway."""

    wants_read: bool
    """Whether there is anything to compare `read` with."""
    read: dict[str, Tensor] = field(default_factory=dict)
    """Sums of what the update has found."""
    written: dict[str, Tensor] = field(default_factory=dict)
    """Sums of what it has left."""


class OnItsWay:
    """Sums of the kinds of state that an update passes, part by part, taken beside the pass that needs a part anyway:
    what a core has just read or written costs it half of what memory costs.
    """

    def __init__(self, state: OwnedState, read: Collection[str]):
        """read: kinds of which is wanted what the update finds, if there is anything to compare it with."""
        self._state, self._sums = state, state.sums
        wants = state.sums is not None and state.sums.wants_read
        self._read = {kind: state.tallies(kind) for kind in read} if wants else {}
        self._written = {kind: state.tallies(kind) for kind in state.moments}

    def of_read(self, kind: str, shard: int, stop: int) -> None:
        """The elements of a shard up to `stop` are read now."""
        if tallies := self._read.get(kind):
            tallies[shard].up_to(stop, all_of_them=True)

    @contextmanager
    def of_written(self, kind: str, shard: int, stop: int) -> Iterator[None]:
        """Those of a moment are written inside the block."""
        self.of_read(kind, shard, stop)
        yield
        self._written[kind][shard].up_to(stop)

    def end(self) -> None:
        """All shards have been passed."""
        for kind, tallies in self._written.items():
            self._state.written(kind, tallies)
        if self._sums is not None:
            self._sums.read |= {kind: total(tallies) for kind, tallies in self._read.items()}


class Rule(ABC):
    """How weights move: an optimizer's mathematics over the owned elements of one tower."""

    sums_on_a_cpu = False
    """Whether `sums_on_its_way` may name anything; the same on every rank. Whoever counts on a CPU what a GPU does
    sets it to False.
    """

    def sums_on_its_way(self, state: OwnedState) -> tuple[str, ...]:
        """Kinds of state of which `update` leaves in state.sums.read what it has found. Local, the same each step."""
        return ()

    @abstractmethod
    def update(
        self, state: OwnedState, optim: OptimConfig, *, gradient_scale: float, rates: Mapping[str, float], t: int
    ) -> Iterator[None]:
        """Move master weights, moments and the weights themselves by update t = 1, 2, …; gradients may be written over.

        Yields once: moments may have moved by then, no weight has; whoever iterates may leave it at that.
        t: of the job; a tensor that was frozen at first is at its own t - began. gradient_scale: of clipping. rates:
        base rate by tower. Collective over the holders of the tower's tensors.
        """
