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
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from engine.checkpoint.format.manifest import WEIGHT
from engine.config.read import OptimConfig
from engine.optim.blocks import Block, Elements
from engine.optim.state import OwnedState, Rule


class Lamb(Rule):
    """The rules above, by `optim.mode`."""

    sums_on_a_cpu = True

    def __init__(self) -> None:
        self._fixed: dict[OwnedState, Fixed] = {}

    def update(
        self, state: OwnedState, optim: OptimConfig, *, gradient_scale: float, rates: Mapping[str, float], t: int
    ) -> Iterator[None]:
        """Direction, ratios over whole tensors, update. Collective over the holders of the tower's tensors."""
        _direction_of(state, optim, gradient_scale, t)
        yield
        ratios = self.trust_ratios(state, [shard.gradient for shard in state.shards.shards], optim)
        factors = [_step_factor(optim, t - began) for began in state.began]
        _apply(state, self.steps(state, optim, ratios, rates, factors))

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


def _direction_of(state: OwnedState, optim: OptimConfig, gradient_scale: float, t: int) -> None:
    """u of every owned element, written over the gradient (no longer needed); moments move on.

    What is found is summed if anybody wants it, which on a GPU nobody does.
    """
    first, second = state.moments
    sums, decays = state.sums, [group.weight_decay for group in state.groups]
    of_one_age = not any(state.began)
    for block in state.blocks():
        sums.finds(first, block)
        _move_first(block.held[first], block.gradient, optim, gradient_scale)
        sums.leaves(first, block)
        sums.finds(second, block)
        _move_second(block.held[second], block.gradient, optim, gradient_scale)
        sums.leaves(second, block)
        for elements, age in [(block, t)] if of_one_age else _by_age(state, block, t):
            _direction(elements.gradient, elements.held[first], elements.held[second], optim, age)
        for segment in block.segments:
            if decay := decays[segment.tensor]:
                segment.gradient.add_(segment.held[WEIGHT], alpha=decay)
        sums.finds(WEIGHT, block)


def _by_age(state: OwnedState, block: Block, t: int) -> list[tuple[Elements, int]]:
    """Tensors of a block, each with the updates that its moments have seen."""
    return [(segment, t - state.began[segment.tensor]) for segment in block.segments]


def _apply(state: OwnedState, steps: Sequence[float | Tensor]) -> None:
    """p -= step x u, then the copy in the model's dtype. steps: of each tensor, numbers or 0-d on the device."""
    for block in state.blocks():
        is_copy = state.master[block.shard] is not state.shards.shards[block.shard].weight
        for segment in block.segments:
            master, step = segment.held[WEIGHT], steps[segment.tensor]
            if isinstance(step, Tensor):
                master.addcmul_(segment.gradient, step, value=-1)
            else:
                master.sub_(segment.gradient, alpha=step)
            if is_copy:
                segment.weight.copy_(master)
        state.sums.leaves(WEIGHT, block)


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
