"""Exponential moving average of the weights, over the owned shards: one more fp32 copy, cut as the master weights are.

a <- d a + (1 - d) w after every update that was applied (optim.ema_decay d), beginning with a = w; no warm-up and no
bias correction. Elementwise, so every layout has the same average. A frozen tensor has none: it is its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine.build import Towers
from engine.checkpoint.format.manifest import AVERAGE, WEIGHT
from engine.optim.optimizer import ShardedOptimizer


@torch.no_grad()
def restart_average(optimizer: ShardedOptimizer) -> None:
    """Begin the average with the weights as they are; nothing where none is kept."""
    if optimizer.optim.ema_decay:
        for tower in optimizer.towers:
            tower.average = [master.clone() for master in tower.master]


@torch.no_grad()
def move_average(optimizer: ShardedOptimizer) -> None:
    """Move the averaged weights by one update."""
    decay = optimizer.optim.ema_decay
    for tower in (tower for tower in optimizer.towers if tower.average and decay):
        for block in tower.blocks():
            block.held[AVERAGE].lerp_(block.held[WEIGHT], 1 - decay)
            tower.sums.leaves(AVERAGE, block)


@contextmanager
def averaged_weights(optimizer: ShardedOptimizer, towers: Towers) -> Iterator[None]:
    """The towers compute with the averages inside the block, with the weights again after it. Collective."""
    towers.wait_for_weights()  # the own slices are about to change
    kept = [[shard.weight.clone() for shard in tower.shards.shards] for tower in optimizer.towers]
    _publish(optimizer, towers, [tower.average for tower in optimizer.towers])
    try:
        with towers.whole_weights():
            yield
    finally:
        _publish(optimizer, towers, kept)


@torch.no_grad()
def _publish(optimizer: ShardedOptimizer, towers: Towers, values: list[list[torch.Tensor]]) -> None:
    for tower, shards in zip(optimizer.towers, values, strict=True):
        for shard, value in zip(tower.shards.shards, shards, strict=True):
            shard.weight.copy_(value)
    towers.gather_weights(wait=True)
