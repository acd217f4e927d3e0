"""AdamW (Loshchilov, Hutter 2019) over sharded state by torch's fused kernel: one pass over everything."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.checkpoint.format.manifest import WEIGHT
from engine.config.read import OptimConfig
from engine.optim.blocks import Block
from engine.optim.groups import TensorGroup
from engine.optim.state import OwnedState, Rule


@dataclass(slots=True)
class _Call:
    """What one call of the kernel moves: parts of tensors of one rate, one decay and one age."""

    group: TensorGroup
    began: int
    weights: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    first: list[Tensor] = field(default_factory=list)
    second: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Plan:
    """The calls of a tower, made once: to sort its tensors costs what moving megabytes costs."""

    blocks: list[Block]
    began: list[int]
    calls: list[list[_Call]]
    """Calls of each block."""


class AdamW(Rule):
    """p -= rate x (m / c1 / (sqrt(v / c2) + eps) + decay x p); elementwise, so every layout does the same."""

    # Four fp32 vectors of so many elements (0.5 MB) stay in a core's own cache, beside other things, from the sums of
    # what is found through the kernel to those of what it leaves. LAMB makes a dozen calls, and takes longer blocks.
    block_elements = 1 << 15
    sums_on_a_cpu = True

    def __init__(self) -> None:
        self._plans: dict[OwnedState, _Plan] = {}

    def update(
        self, state: OwnedState, optim: OptimConfig, *, gradient_scale: float, rates: Mapping[str, float], t: int
    ) -> Iterator[None]:
        """The whole update of the owned elements, block by block, whose words are summed before the kernel and behind
        it, while a core has them near. It yields at its end: the kernel moves weights and moments at once.
        """
        device = state.shards.counted.device
        # Without a scale the kernel does not write the gradients back.
        scale = None if gradient_scale == 1 else torch.full((), 1 / gradient_scale, device=device)
        ages = {began: torch.full((), float(t - began), device=device) for began in set(state.began)}
        plan, sums, kinds = self._plan(state), state.sums, (WEIGHT, *state.moments)
        for block, calls in zip(plan.blocks, plan.calls, strict=True):
            for kind in kinds:
                sums.finds(kind, block)
            for call in calls:
                torch._fused_adamw_(
                    call.weights,
                    call.gradients,
                    call.first,
                    call.second,
                    [],
                    [ages[call.began]] * len(call.weights),
                    lr=rates[call.group.tower] * call.group.lr_scale,
                    beta1=optim.betas[0],
                    beta2=optim.betas[1],
                    weight_decay=call.group.weight_decay,
                    eps=optim.eps,
                    amsgrad=False,
                    maximize=False,
                    grad_scale=scale,
                )
            for kind in kinds:
                sums.leaves(kind, block)
            if state.master[block.shard] is not state.shards.shards[block.shard].weight:
                block.weight.copy_(block.held[WEIGHT])
        yield

    def _plan(self, state: OwnedState) -> _Plan:
        blocks, known = state.blocks(), self._plans.get(state)
        if known is None or known.blocks is not blocks or known.began != state.began:
            known = _Plan(blocks, list(state.began), [_calls(state, block) for block in blocks])
            self._plans[state] = known
        return known


def _calls(state: OwnedState, block: Block) -> list[_Call]:
    calls: dict[tuple[TensorGroup, int], _Call] = {}
    first, second = state.moments
    for segment in block.segments:
        key = state.groups[segment.tensor], state.began[segment.tensor]
        call = calls.setdefault(key, _Call(*key))
        call.weights.append(segment.held[WEIGHT])
        call.gradients.append(segment.gradient)
        call.first.append(segment.held[first])
        call.second.append(segment.held[second])
    return list(calls.values())
