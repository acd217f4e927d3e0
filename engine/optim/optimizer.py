"""The optimizer of a job: shared clipping, per-tower shards, per-tensor rates (docs/optimizer.md).

State (fp32 master weight, moments) exists for the owned elements only (engine/optim/state.py). How a tower's elements
move is a rule's matter: `RULES` has one a name of `optim.name`.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from engine.config.read import OptimConfig
from engine.config.sections.optim import MOMENTS
from engine.optim.adamw import AdamW
from engine.optim.groups import TensorGroup, base_rate
from engine.optim.lamb import Lamb
from engine.optim.rates import warmup_cosine
from engine.optim.state import OwnedState, Rule
from engine.parallel.mesh import Axis
from engine.parallel.shards import TowerShards

RULES: dict[str, type[Rule]] = {"lamb": Lamb, "adamw": AdamW}


class ShardedOptimizer:
    """One optimizer over several towers: shared clipping, per-tower shards, per-tensor rates and ratios."""

    def __init__(
        self,
        towers: list[tuple[TowerShards, list[TensorGroup]]],
        optim: OptimConfig,
        total_steps: int,
        world: Axis,
        frozen: Sequence[TowerShards] = (),
    ):
        """frozen: what of the towers is not trained, for those who read and write weights."""
        self.optim = optim
        self.total_steps = total_steps
        self.world = world
        self.rule = RULES[optim.name]()
        self.moments = MOMENTS[optim.name]
        """Kinds of state beside the weights, as checkpoints name them."""
        self.towers = [
            OwnedState(shards, groups, self.moments, block_elements=self.rule.block_elements)
            for shards, groups in towers
        ]
        """What is trained, one a part of the model; some of them may have nothing here."""
        self.frozen = [OwnedState(shards, [], (), trained=False) for shards in frozen]
        """What is not, of parts that have some."""
        self.step_count = 0
        """Steps of the schedule of rates, skipped ones included."""
        self.update_count = 0
        """Updates that the moments have seen; the bias corrections follow it."""

    @property
    def held(self) -> list[OwnedState]:
        """Everything whose weights this rank owns a part of."""
        return [*self.towers, *self.frozen]

    def rates(self) -> dict[str, float]:
        """Learning rate of each tower (before layer decay) at the next step."""
        factor = warmup_cosine(
            self.step_count,
            warmup_steps=self.optim.warmup_steps,
            total_steps=self.total_steps,
            min_ratio=self.optim.min_lr_ratio,
        )
        return {tower: factor * base_rate(tower, self.optim) for tower in ("vision", "text", "other")}

    @torch.no_grad()
    def step(self) -> float:
        """Update the owned weights from the reduced gradients; returns the global gradient norm before clipping."""
        norm = self.gradient_norm()
        self.apply(norm)
        return norm

    @torch.no_grad()
    def apply(self, norm: float, go_on: Callable[[], bool] = lambda: True) -> bool:
        """Update as `step` does, where the gradient norm is known; whether it counts.

        go_on: asked when all has been summed that the update finds; where it says no, the state is at fault, and left
        as it is then: to be loaded anew.
        """
        clip = self.optim.clip_grad_norm
        scale = clip / norm if 0 < clip < norm else 1.0
        rates = self.rates()
        self.step_count += 1
        self.update_count += 1
        updates = [
            self.rule.update(tower, self.optim, gradient_scale=scale, rates=rates, t=self.update_count)
            for tower in self.towers
            if tower.shards.shards
        ]
        for update in updates:
            next(update)
        if not go_on():
            self.update_count -= 1
            return False
        for update in updates:
            next(update, None)
        return True

    @torch.no_grad()
    def reset_moments(self) -> None:
        """Let the moments of every tensor start at 0."""
        for flat in (flat for tower in self.towers for flats in tower.moments.values() for flat in flats):
            flat.zero_()

    def began(self, updates: Mapping[str, int]) -> None:
        """Let the moments of some tensors count from so many updates of the job on, those of the others from 0."""
        for tower in self.towers:
            tower.began = [updates.get(tensor.name, 0) for tensor in tower.shards.tensors]

    def skip(self) -> None:
        """A step without an update: weights, moments and update_count stay, the schedule goes on."""
        self.step_count += 1

    @torch.no_grad()
    def clamp(self, name: str, low: float, high: float) -> None:
        """Keep the owned elements of logical tensor `name`, if there is one, within bounds."""
        for tower in self.towers:
            for i, piece in tower.shards.owned():
                if tower.shards.tensors[piece.tensor].name == name:
                    part = slice(piece.start, piece.stop)
                    with tower.changes(i, part):
                        tower.master[i][part].clamp_(low, high)
                    tower.shards.shards[i].weight[part].copy_(tower.master[i][part])

    def over_all_ranks(self, count: Tensor) -> int:
        """The sum of a small number over all ranks; waits for the device."""
        total = count.double().view(1)
        dist.all_reduce(total, group=self.world.group)
        return int(total)

    def gradient_norm(self) -> float:
        """Norm over every tensor of every tower, each element once."""
        nothing = torch.zeros((), device=self.towers[0].shards.counted.device)
        return self.gradient_norm_and(nothing, nothing)[0]

    def gradient_norm_and(self, number: Tensor, count: Tensor) -> tuple[float, float, float]:
        """The norm, a 0-d tensor that the host wants as well, and the sum over all ranks of another, in one copy: the
        step's wait for the device.
        """
        total = torch.zeros(2, dtype=torch.float64, device=self.towers[0].shards.counted.device)
        for tower in self.towers:
            total[0] += tower.shards.squares([shard.gradient for shard in tower.shards.shards]).sum()
        total[1] = count
        dist.all_reduce(total, group=self.world.group)
        square, of_all, value = torch.cat([total, number.double().view(1)]).tolist()
        return math.sqrt(square), value, of_all
