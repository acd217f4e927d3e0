"""LAMB over sharded state, exact per logical tensor (docs/optimizer.md).

The trust ratio of a tensor uses the norms of the whole tensor, however tensor and data parallelism cut it. So the
update does not depend on the layout, unlike LAMB on flattened ZeRO partitions.

Rules, step t = 1, 2, …, m and v the moments, c1 = 1 - b1^t, c2 = 1 - b2^t, per tensor p:
- paper  (DeepSpeed's FusedLamb, which trained the released models): u = m / (sqrt(v) + eps) + wd p;
  ratio = clamp(|p| / |u|, trust_min, trust_max), 1 if either norm is 0; p -= lr sqrt(c2) / c1 ratio u.
- nvlamb (the authors' own class): u = (m / c1) / (sqrt(v) / sqrt(c2) + eps) + wd p; ratio = |p| / |u| where wd > 0
  (everywhere with nvlamb_always_adapt), 1 if either norm is 0.
"""

import math
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from operator import itemgetter

import torch
from torch import Tensor

from engine.checkpoint.format.manifest import WEIGHT
from engine.config.read import OptimConfig
from engine.optim.passes import in_cache
from engine.optim.state import OnItsWay, OwnedState, Rule

_Decay = tuple[int, int, float]
Decayed = list[list[_Decay]]
"""Shards, each with (start, stop, weight decay) of its pieces that decay, in order."""


class Lamb(Rule):
    """The rules above, by `optim.mode`."""

    sums_on_a_cpu = True

    def __init__(self) -> None:
        self._fixed: dict[OwnedState, Fixed] = {}

    def sums_on_its_way(self, state: OwnedState) -> tuple[str, ...]:
        """Masters and moments, where parts of them are near a core (not a GPU's), and all have the same age."""
        on_its_way = self.sums_on_a_cpu and state.shards.counted.is_cpu and not any(state.began)
        return (WEIGHT, *state.moments) if on_its_way else ()

    def update(
        self, state: OwnedState, optim: OptimConfig, *, gradient_scale: float, rates: Mapping[str, float], t: int
    ) -> Iterator[None]:
        """Direction, ratios over whole tensors, update. Collective over the holders of the tower's tensors."""
        decayed = self.fixed(state, optim).decayed
        updates = _direction_of(state, optim, gradient_scale, t, decayed, self.sums_on_its_way(state))
        yield
        ratios = self.trust_ratios(state, updates, optim)
        factors = [_step_factor(optim, t - began) for began in state.began]
        _apply(state, updates, self.steps(state, optim, ratios, rates, factors))

    def steps(
        self, state: OwnedState, optim: OptimConfig, ratios: Tensor, rates: Mapping[str, float], factors: list[float]
    ) -> Sequence[float | Tensor]:
        """Rate x layer decay x ratio x factor of each tensor: numbers on a CPU, elsewhere 0-d tensors of the device."""
        if not ratios.is_cpu:
            return self.fixed(state, optim).steps(ratios, rates, factors)
        of_tensors = zip(state.groups, ratios.tolist(), factors, strict=True)
        return [rates[group.tower] * group.lr_scale * ratio * factor for group, ratio, factor in of_tensors]

    def trust_ratios(self, state: OwnedState, updates: list[Tensor], optim: OptimConfig) -> Tensor:
        """One ratio a logical tensor, float64 [tensors], from the norms of the whole tensor; nothing waits for them."""
        both = torch.cat([state.shards.squares(state.master), state.shards.squares(updates)])
        weight, update = state.shards.over_holders(both).sqrt().view(2, -1).unbind()
        ratio = weight / update
        if optim.mode == "paper":
            ratio = ratio.clamp(optim.trust_min, optim.trust_max)
        return torch.where(self.fixed(state, optim).adapts & (weight != 0) & (update != 0), ratio, 1.0)

    def fixed(self, state: OwnedState, optim: OptimConfig) -> "Fixed":
        """Made at the first step."""
        if state not in self._fixed:
            self._fixed[state] = Fixed(state, optim)
        return self._fixed[state]


class Fixed:
    """What of the tensors' steps never changes, moved to the device once."""

    def __init__(self, state: OwnedState, optim: OptimConfig):
        device = state.shards.counted.device
        of_tensors = list(zip(state.shards.tensors, state.groups, strict=True))
        adapts = [_adapts(optim, len(tensor.shape), group.weight_decay) for tensor, group in of_tensors]
        self.adapts = torch.tensor(adapts, device=device)
        """Bool [tensors]: whose steps follow their norms."""
        self.scales = {
            tower: torch.tensor(
                [group.lr_scale * (group.tower == tower) for group in state.groups], dtype=torch.float64, device=device
            )
            for tower in {group.tower for group in state.groups}
        }
        """Tower -> float64 [tensors]: layer decay of its tensors, 0 of the others."""
        decays = [group.weight_decay for group in state.groups]
        self.decayed: Decayed = [
            [(piece.start, piece.stop, decays[piece.tensor]) for piece in shard.pieces if decays[piece.tensor]]
            for shard in state.shards.shards
        ]
        """Shard -> what of it decays, in order."""

    def steps(self, ratios: Tensor, rates: Mapping[str, float], factors: list[float]) -> tuple[Tensor, ...]:
        """Rate x ratio x factor of each tensor, 0-d fp32, which the host does not learn."""
        rate = sum((scale * rates[tower] for tower, scale in self.scales.items()), torch.zeros_like(ratios))
        alike = len(set(factors)) == 1
        # One number goes along with the launch; a list of them is a copy to the device.
        factor = factors[0] if alike else torch.tensor(factors, dtype=ratios.dtype, device=ratios.device)
        return (rate * ratios * factor).float().unbind()


def _step_factor(optim: OptimConfig, t: int) -> float:
    """DeepSpeed corrects the bias on the step, the others inside the update."""
    if optim.mode == "paper":
        return math.sqrt(1 - optim.betas[1] ** t) / (1 - optim.betas[0] ** t)
    return 1.0


def _direction_of(
    state: OwnedState, optim: OptimConfig, gradient_scale: float, t: int, decayed: Decayed, summed: Collection[str]
) -> list[Tensor]:
    """u of every owned element, written over the gradient (no longer needed); moments move on, and what they and the
    masters were is summed.
    """
    updates = [shard.gradient for shard in state.shards.shards]
    sums, (first, second) = OnItsWay(state, summed), state.moments
    for i, start, stop, own_t in _of_one_count(state, t):
        flats = [flats[i][start:stop] for flats in (updates, *state.moments.values(), state.master)]
        for update, m, v, master in in_cache(*flats):
            stop = start + update.numel()
            with sums.of_written(first, i, stop):
                _move_first(m, update, optim, gradient_scale)
            with sums.of_written(second, i, stop):
                _move_second(v, update, optim, gradient_scale)
            _direction(update, m, v, optim, own_t)
            _add_weight_decay(decayed[i], start, update, master)
            sums.of_read(WEIGHT, i, stop)
            start = stop
    sums.end()
    return updates


def _of_one_count(state: OwnedState, t: int) -> Iterator[tuple[int, int, int, int]]:
    """(shard, start, stop, updates): elements whose moments have seen as many updates, in order; most often all t."""
    if not any(state.began):
        yield from ((i, 0, shard.gradient.numel(), t) for i, shard in enumerate(state.shards.shards))
        return
    for i, piece in state.shards.owned():
        yield i, piece.start, piece.stop, t - state.began[piece.tensor]


def _add_weight_decay(decayed: Sequence[_Decay], start: int, update: Tensor, master: Tensor) -> None:
    """Both are the elements from `start` on of a shard. decayed: of the whole shard, of which only those are met."""
    end = start + update.numel()
    for first, stop, decay in decayed[bisect_right(decayed, start, key=itemgetter(1)) :]:
        if first >= end:
            break
        part = slice(max(first, start) - start, min(stop, end) - start)
        update[part].add_(master[part], alpha=decay)


def _apply(state: OwnedState, updates: list[Tensor], steps: Sequence[float | Tensor]) -> None:
    """p -= step x u, then the copy in the model's dtype. steps: of each tensor, numbers or 0-d on the device."""
    tallies = state.tallies(WEIGHT)
    for i, piece in state.shards.owned():
        part, whole = slice(piece.start, piece.stop), state.shards.shards[i].weight
        step, is_copy, stop = steps[piece.tensor], state.master[i] is not whole, piece.start
        for master, update, weight in in_cache(state.master[i][part], updates[i][part], whole[part]):
            if isinstance(step, Tensor):
                master.addcmul_(update, step, value=-1)
            else:
                master.sub_(update, alpha=step)
            if is_copy:
                weight.copy_(master)
            stop += master.numel()
            tallies[i].up_to(stop)
    state.written(WEIGHT, tallies)


def _move_first(m: Tensor, g: Tensor, optim: OptimConfig, scale: float) -> None:
    """The moment of scale x g."""
    b1, _ = optim.betas
    m.mul_(b1).add_(g, alpha=(1 - b1) * scale)


def _move_second(v: Tensor, g: Tensor, optim: OptimConfig, scale: float) -> None:
    """The moment of the squares of scale x g."""
    _, b2 = optim.betas
    v.mul_(b2).addcmul_(g, g, value=(1 - b2) * scale**2)


def _direction(g: Tensor, m: Tensor, v: Tensor, optim: OptimConfig, t: int) -> None:
    """g <- u before weight decay."""
    if optim.mode == "paper":
        torch.div(m, torch.sqrt(v, out=g).add_(optim.eps), out=g)
        return
    # (m / c1) / (sqrt(v) / sqrt(c2) + eps), with both corrections moved to where they cost one scalar
    b1, b2 = optim.betas
    c1, root_c2 = 1 - b1**t, math.sqrt(1 - b2**t)
    torch.div(m, torch.sqrt(v, out=g).add_(optim.eps * root_c2), out=g).mul_(root_c2 / c1)


def _adapts(optim: OptimConfig, dims: int, weight_decay: float) -> bool:
    """Whether a tensor's step follows its norms."""
    if optim.trust_exclude_1d and dims <= 1:
        return False
    return optim.mode == "paper" or bool(weight_decay) or optim.nvlamb_always_adapt
