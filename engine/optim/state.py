"""What the optimizer keeps of the elements that a rank owns, by kind, as checkpoints read and write it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.checkpoint.format.manifest import AVERAGE, WEIGHT
from engine.config.read import OptimConfig
from engine.optim.blocks import Block, BlockSums, cut
from engine.optim.groups import TensorGroup
from engine.optim.passes import BLOCK_ELEMENTS, words_of
from engine.parallel.shards import TowerShards


class OwnedState:
    """The state of one tower on this rank. Every list has one 1-D fp32 tensor a shard."""

    def __init__(
        self,
        shards: TowerShards,
        groups: list[TensorGroup],
        moments: tuple[str, ...],
        *,
        trained: bool = True,
        block_elements: int = BLOCK_ELEMENTS,
    ):
        """groups: of each tensor. moments: kinds of state that the rule keeps beside the weights; they start at 0.

        trained: False for weights that lie there as they are, in the model's dtype, without moments and average.
        block_elements: of a block where it stays near a core, about.
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
        self.sums = Sums()
        """Where an update leaves sums of bits."""
        self._block_elements = block_elements
        self._blocks: list[Block] = []
        self._cut: list[Tensor] = []
        """What they are views of."""

    def kinds(self) -> dict[str, list[Tensor]]:
        """Kind, as checkpoints name it -> its tensors, one a shard; what is not kept is not there."""
        held = {WEIGHT: self.master, **self.moments, AVERAGE: self.average}
        return {kind: flats for kind, flats in held.items() if flats}

    def blocks(self) -> list[Block]:
        """All of it by blocks, which stay the same objects as long as the tensors do."""
        kinds = self.kinds()
        flats = [flat for of_kind in kinds.values() for flat in of_kind]
        if len(flats) != len(self._cut) or any(known is not flat for known, flat in zip(self._cut, flats, strict=True)):
            self._blocks, self._cut = cut(self.shards.shards, kinds, self._block_elements), flats
        return self._blocks

    @contextmanager
    def changes(self, shard: int, part: slice) -> Iterator[None]:
        """A few master weights change inside the block, after the update has summed them."""
        left = self.sums.left
        if left is None or WEIGHT not in left.taken:
            yield
            return
        near = []
        for block in self.blocks():
            if block.shard == shard and block.start < part.stop and part.start < block.stop:
                start, stop = max(part.start, block.start) - block.start, min(part.stop, block.stop) - block.start
                near.append((block, words_of(block.held[WEIGHT], slice(start, stop))))
        before = [words.sum(dtype=torch.int64) for _, words in near]
        yield
        for (block, words), bits in zip(near, before, strict=True):
            left.add(WEIGHT, block, words.sum(dtype=torch.int64) - bits)

    def to_sum(self, used: BlockSums | None = None) -> BlockSums:
        """For sums of the bits of it all. used: what may be used again, where the blocks are still the same."""
        blocks = self.blocks()
        if used is not None and used.blocks is blocks:
            return used.begin()
        return BlockSums(blocks, self.shards.counted.device)


@dataclass(frozen=True)
class Sums:
    """Sums of bits of the kinds of state that an update sums on its way, block by block, each beside the pass that
    needs it anyway: what a core has just read or written costs it a third of what memory costs.
    """

    found: BlockSums | None = None
    """What the update finds; None: nobody wants it."""
    left: BlockSums | None = None
    """What it leaves."""

    def finds(self, kind: str, block: Block) -> None:
        """Called before a block's kind of state is written."""
        if self.found is not None:
            self.found.take(kind, block)

    def leaves(self, kind: str, block: Block) -> None:
        """Called after it."""
        if self.left is not None:
            self.left.take(kind, block)


class Rule(ABC):
    """How weights move: an optimizer's mathematics over the owned elements of one tower."""

    block_elements = BLOCK_ELEMENTS
    """Elements of a block of the state, about: as many as stay near a core from one pass of the rule to the next."""
    sums_on_a_cpu = False
    """Whether `update` sums what it finds, where blocks of it are near a core (not a GPU's); the same on every rank.
    Whoever counts on a CPU what a GPU does sets it to False.
    """

    def sums_on_its_way(self, state: OwnedState) -> tuple[str, ...]:
        """Kinds of state of which `update` sums in state.sums.found what it finds. Local, the same each step."""
        return (WEIGHT, *state.moments) if self.sums_on_a_cpu and state.shards.counted.is_cpu else ()

    @abstractmethod
    def update(
        self, state: OwnedState, optim: OptimConfig, *, gradient_scale: float, rates: Mapping[str, float], t: int
    ) -> Iterator[None]:
        """Move master weights, moments and the weights themselves by update t = 1, 2, …; gradients may be written over.

        Yields once, when it has summed all that it finds: moments may have moved by then, and weights where one pass
        moves both. Whoever iterates may leave it at that, and must not use the state any more.
        t: of the job; a tensor that was frozen at first is at its own t - began. gradient_scale: of clipping. rates:
        base rate by tower. Collective over the holders of the tower's tensors.
        """
