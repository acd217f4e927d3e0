"""LAMB and AdamW over sharded state, exact per logical tensor (docs/optimizer.md).

State (fp32 master weight, first and second moment) exists for the owned elements only; the trust ratio of a tensor uses
the norms of the whole tensor, however tensor and data parallelism cut it. So the update does not depend on the layout,
unlike LAMB on flattened ZeRO partitions.

Rules, step t = 1, 2, …, m and v the moments, c1 = 1 - b1^t, c2 = 1 - b2^t, per tensor p:
- paper  (DeepSpeed's FusedLamb, which trained the released models): u = m / (sqrt(v) + eps) + wd p;
  ratio = clamp(|p| / |u|, trust_min, trust_max), 1 if either norm is 0; p -= lr sqrt(c2) / c1 ratio u.
- nvlamb (the authors' own class): u = (m / c1) / (sqrt(v) / sqrt(c2) + eps) + wd p; ratio = |p| / |u| where wd > 0
  (everywhere with nvlamb_always_adapt), 1 if either norm is 0.
- adamw  (Loshchilov, Hutter 2019): torch's own, fused: one pass over weight, gradient and moments.
"""

import math
from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from engine.config.read import OptimConfig
from engine.optim.groups import TensorGroup, base_rate
from engine.optim.rates import warmup_cosine
from engine.parallel.mesh import Axis
from engine.parallel.shards import TowerShards


class ShardedOptimizer:
    """One optimizer over several towers: shared clipping, per-tower shards, per-tensor rates and ratios."""

    def __init__(
        self, towers: list[tuple[TowerShards, list[TensorGroup]]], optim: OptimConfig, total_steps: int, world: Axis
    ):
        self.optim = optim
        self.total_steps = total_steps
        self.world = world
        self.towers = [_TowerState(shards, groups) for shards, groups in towers]
        self.step_count = 0
        """Steps of the schedule of rates, skipped ones included."""
        self.update_count = 0
        """Updates that the moments have seen; the bias corrections follow it."""

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
    def apply(self, norm: float) -> None:
        """The same where the gradient norm is known."""
        clip = self.optim.clip_grad_norm
        scale = clip / norm if 0 < clip < norm else 1.0
        rates = self.rates()
        self.step_count += 1
        self.update_count += 1
        for tower in self.towers:
            if self.optim.name == "adamw":
                tower.adamw(self.optim, scale, rates, self.update_count)
                continue
            updates = tower.direction(self.optim, scale, self.update_count)
            ratios = tower.trust_ratios(updates, self.optim)
            tower.apply(updates, ratios, rates, _step_factor(self.optim, self.update_count))

    @torch.no_grad()
    def reset_moments(self) -> None:
        """Both moments of every tensor start at 0."""
        for tower in self.towers:
            torch._foreach_zero_(tower.first + tower.second)

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
                    tower.master[i][part].clamp_(low, high)
                    tower.shards.shards[i].weight[part].copy_(tower.master[i][part])

    def gradient_norm(self) -> float:
        """Norm over every tensor of every tower, each element once."""
        device = self.towers[0].shards.counted.device
        total = torch.zeros(1, dtype=torch.float64, device=device)
        for tower in self.towers:
            total += tower.shards.squares([shard.gradient for shard in tower.shards.shards]).sum()
        dist.all_reduce(total, group=self.world.group)
        return math.sqrt(total.item())


def _step_factor(optim: OptimConfig, t: int) -> float:
    """DeepSpeed corrects the bias on the step, the others inside the update."""
    if optim.mode == "paper":
        return math.sqrt(1 - optim.betas[1] ** t) / (1 - optim.betas[0] ** t)
    return 1.0


class _TowerState:
    def __init__(self, shards: TowerShards, groups: list[TensorGroup]):
        self.shards = shards
        self.groups = groups
        weights = [shard.weight for shard in shards.shards]
        # fp32 weights are their own masters; lower precisions keep an fp32 copy of the owned elements.
        self.master = [w if w.dtype == torch.float32 else w.float() for w in weights]
        self.first = [torch.zeros_like(w) for w in self.master]
        self.second = [torch.zeros_like(w) for w in self.master]
        self.average: list[Tensor] = []
        """Moving average of the master weights; empty where none is kept (engine/optim/average.py)."""

    def adamw(self, optim: OptimConfig, gradient_scale: float, rates: dict[str, float], t: int) -> None:
        """The whole update of the owned elements; pieces of one rate and one decay go into one call."""
        equal: dict[tuple[float, float], list[tuple[Tensor, ...]]] = defaultdict(list)
        for i, piece in self.shards.owned():
            group, part = self.groups[piece.tensor], slice(piece.start, piece.stop)
            flats = (self.master[i], self.shards.shards[i].gradient, self.first[i], self.second[i])
            equal[rates[group.tower] * group.lr_scale, group.weight_decay].append(tuple(flat[part] for flat in flats))
        device = self.shards.counted.device
        # Without a scale the kernel does not write the gradients back.
        scale = None if gradient_scale == 1 else torch.tensor(1 / gradient_scale, device=device)
        for (rate, decay), pieces in equal.items():
            weights, gradients, first, second = map(list, zip(*pieces, strict=True))
            torch_adamw(
                weights,
                gradients,
                first,
                second,
                [],
                list(torch.full((len(pieces),), t - 1.0, device=device).unbind()),
                fused=True,
                grad_scale=scale,
                amsgrad=False,
                beta1=optim.betas[0],
                beta2=optim.betas[1],
                lr=rate,
                weight_decay=decay,
                eps=optim.eps,
                maximize=False,
            )
        torch._foreach_copy_([shard.weight for shard in self.shards.shards], self.master)

    def direction(self, optim: OptimConfig, gradient_scale: float, t: int) -> list[Tensor]:
        """u of every owned element, written over the gradient (no longer needed); moments move on."""
        updates = [shard.gradient for shard in self.shards.shards]
        for flats in zip(updates, self.first, self.second, strict=True):
            for gradient, m, v in _in_cache(*flats):
                _direction(gradient, m, v, optim, gradient_scale, t)
        self._add_weight_decay(updates)
        return updates

    def _add_weight_decay(self, updates: list[Tensor]) -> None:
        for i, piece in self.shards.owned():
            decay = self.groups[piece.tensor].weight_decay
            if decay:
                part = slice(piece.start, piece.stop)
                updates[i][part].add_(self.master[i][part], alpha=decay)

    def trust_ratios(self, updates: list[Tensor], optim: OptimConfig) -> list[float]:
        """One ratio a logical tensor, from the norms of the whole tensor."""
        both = torch.cat([self.shards.squares(self.master), self.shards.squares(updates)])
        weight, update = self.shards.over_holders(both).sqrt().cpu().view(2, -1).tolist()
        tensors = zip(self.shards.tensors, self.groups, weight, update, strict=True)
        return [_trust_ratio(w, u, optim, len(t.shape), g.weight_decay) for t, g, w, u in tensors]

    def apply(self, updates: list[Tensor], ratios: list[float], rates: dict[str, float], factor: float) -> None:
        """p -= rate x layer decay x ratio x u, then the copy in the model's dtype."""
        steps = [
            rates[group.tower] * group.lr_scale * ratio * factor
            for group, ratio in zip(self.groups, ratios, strict=True)
        ]
        for i, piece in self.shards.owned():
            part, whole = slice(piece.start, piece.stop), self.shards.shards[i].weight
            is_copy = self.master[i] is not whole
            for master, update, weight in _in_cache(self.master[i][part], updates[i][part], whole[part]):
                master.sub_(update, alpha=steps[piece.tensor])
                if is_copy:
                    weight.copy_(master)


_CACHED_ELEMENTS = 1 << 18
"""Three fp32 vectors of so many elements (3 MB) stay near one CPU core; more and smaller parts cost more calls."""


def _in_cache(*flats: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Equal parts of vectors of one length, short enough for the passes over them to hit the cache (GPU: one part)."""
    size = _CACHED_ELEMENTS if flats[0].is_cpu else max(1, flats[0].numel())
    return zip(*(flat.split(size) for flat in flats), strict=True)


def _direction(g: Tensor, m: Tensor, v: Tensor, optim: OptimConfig, scale: float, t: int) -> None:
    """g <- u (before weight decay); m, v <- moments of scale x g."""
    b1, b2 = optim.betas
    m.mul_(b1).add_(g, alpha=(1 - b1) * scale)
    v.mul_(b2).addcmul_(g, g, value=(1 - b2) * scale**2)
    if optim.mode == "paper":
        torch.div(m, torch.sqrt(v, out=g).add_(optim.eps), out=g)
        return
    # (m / c1) / (sqrt(v) / sqrt(c2) + eps), with both corrections moved to where they cost one scalar
    c1, root_c2 = 1 - b1**t, math.sqrt(1 - b2**t)
    torch.div(m, torch.sqrt(v, out=g).add_(optim.eps * root_c2), out=g).mul_(root_c2 / c1)


def _trust_ratio(weight: float, update: float, optim: OptimConfig, dims: int, weight_decay: float) -> float:
    if weight == 0 or update == 0 or (optim.trust_exclude_1d and dims <= 1):
        return 1.0
    if optim.mode == "nvlamb":
        return weight / update if weight_decay or optim.nvlamb_always_adapt else 1.0
    return min(max(weight / update, optim.trust_min), optim.trust_max)
