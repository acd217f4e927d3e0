"""What the optimizer keeps of the elements that a rank owns, by kind, as checkpoints read and write it."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from engine.checkpoint.format.manifest import AVERAGE, WEIGHT
from engine.config.read import OptimConfig
from engine.optim.groups import TensorGroup
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

    def kinds(self) -> dict[str, list[Tensor]]:
        """Kind, as checkpoints name it -> its tensors, one a shard; what is not kept is not there."""
        held = {WEIGHT: self.master, **self.moments, AVERAGE: self.average}
        return {kind: flats for kind, flats in held.items() if flats}


class Rule(Protocol):
    """How weights move: an optimizer's mathematics over the owned elements of one tower."""

    def update(
        self, state: OwnedState, optim: OptimConfig, *, gradient_scale: float, rates: Mapping[str, float], t: int
    ) -> None:
        """Move master weights, moments and the weights themselves by update t = 1, 2, …; gradients may be written over.

        t: of the job; a tensor that was frozen at first is at its own t - began. gradient_scale: of clipping. rates:
        base rate by tower. Collective over the holders of the tower's tensors.
        """
        ...
