"""Which micro-batches of a step run operator by operator, and which are booked as repetitions of one that did.

Every micro-batch runs the same operators on the same shapes through a chunk of layers; it differs from its like only in
whether its activations are kept, and at the ends: the first one encoded may wait for weights and is the last one of the
backprop, where gradients are reduced. So the first two run, and the first and the last of those that keep activations,
and of those that do not: in both directions one that runs comes before those that repeat it. What is stashed and kept
grows through the encode phase and shrinks through the backprop, so the moments of highest memory are among these.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Folding:
    """The choice for a step of `micro_batches`, the last `keep` of which keep their activations."""

    micro_batches: int
    keep: int
    every: bool = False
    """Run them all."""

    def runs(self, micro_batch: int) -> bool:
        """Whether it runs operator by operator."""
        first_kept = self.micro_batches - self.keep
        return self.every or micro_batch in (0, 1, first_kept - 1, first_kept, self.micro_batches - 1)

    def is_kept(self, micro_batch: int) -> bool:
        """Whether its activations are kept."""
        return micro_batch >= self.micro_batches - self.keep

    @property
    def running(self) -> int:
        """How many run."""
        return sum(self.runs(i) for i in range(self.micro_batches))
