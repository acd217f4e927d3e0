"""AdamW (Loshchilov, Hutter 2019) over sharded state by torch's fused kernel: one pass over everything."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.checkpoint.format.manifest import WEIGHT
from engine.config.read import OptimConfig
from engine.optim.blocks import Block
from engine.optim.groups import TensorGroup
from engine.optim.state import OwnedState, Rule

_STRIP_ELEMENTS = 1 << 15
"""Four fp32 vectors of so many elements (0.5 MB) stay in a core's own cache, beside other things, from the kernel to
the sums of what it leaves. One call moves them, where LAMB makes a dozen and takes longer strips.
"""
_WHOLE_VECTORS = 1 << 10
"""The kernel takes a tensor by vectors of a core's width, and what is left at its end with another rounding (torch
2.13): a tensor is cut where a multiple of them ends, so that cutting it changes no bit.
"""


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
class _Strip:
    """A part of a block: what moves it, and the bits of what it holds by kind."""

    calls: Sequence[_Call]
    words: Sequence[Tensor]
    sums: Sequence[Tensor]
    """Where they are summed, 0-d, one a kind."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """All strips of a tower, made once: to sort its tensors costs what moving megabytes costs."""

    blocks: list[Block]
    began: list[int]
    strips: list[tuple[list[_Strip], Tensor]]
    """For each block its strips, and their sums: int64 [kinds, strips]."""


class AdamW(Rule):
    """p -= rate x (m / c1 / (sqrt(v / c2) + eps) + decay x p); elementwise, so every layout does the same."""

    def __init__(self) -> None:
        self._plans: dict[OwnedState, _Plan] = {}

    def update(
        self, state: OwnedState, optim: OptimConfig, *, gradient_scale: float, rates: Mapping[str, float], t: int
    ) -> Iterator[None]:
        """The whole update of the owned elements, strip by strip: what it leaves is summed while a core has it near."""
        yield
        device, left = state.shards.counted.device, state.sums.left
        # Without a scale the kernel does not write the gradients back.
        scale = None if gradient_scale == 1 else torch.full((), 1 / gradient_scale, device=device)
        ages = {began: torch.full((), float(t - began), device=device) for began in set(state.began)}
        plan = self._plan(state)
        for block, (strips, sums) in zip(plan.blocks, plan.strips, strict=True):
            for strip in strips:
                for call in strip.calls:
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
                if left is not None:
                    for words, total in zip(strip.words, strip.sums, strict=True):
                        torch.sum(words, 0, out=total)
            if left is not None:
                left.take_parts(block, sums)
            if state.master[block.shard] is not state.shards.shards[block.shard].weight:
                block.weight.copy_(block.held[WEIGHT])

    def _plan(self, state: OwnedState) -> _Plan:
        blocks, known = state.blocks(), self._plans.get(state)
        if known is None or known.blocks is not blocks or known.began != state.began:
            known = _Plan(blocks, list(state.began), [_strips(state, block) for block in blocks])
            self._plans[state] = known
        return known


def _strips(state: OwnedState, block: Block) -> tuple[list[_Strip], Tensor]:
    kinds, elements = (WEIGHT, *state.moments), block.stop - block.start
    size = _STRIP_ELEMENTS if block.words[WEIGHT].is_cpu else elements
    starts = range(0, elements, size)
    sums = torch.zeros(len(kinds), len(starts), dtype=torch.int64, device=state.shards.counted.device)
    strips = []
    for start, cells in zip(starts, sums.unbind(1), strict=True):
        stop = min(start + size, elements)
        words = [block.words[kind] for kind in kinds]
        of_kinds = [bits[start * bits.numel() // elements : stop * bits.numel() // elements] for bits in words]
        strips.append(_Strip(_calls(state, block, block.start + start, block.start + stop), of_kinds, cells.unbind()))
    return strips, sums


def _calls(state: OwnedState, block: Block, begin: int, end: int) -> list[_Call]:
    """Tensors among elements [begin, end) of a block's shard, each from and to where whole vectors of it end."""
    calls: dict[tuple[TensorGroup, int], _Call] = {}
    first, second = (flats[block.shard] for flats in state.moments.values())
    shard, master = state.shards.shards[block.shard], state.master[block.shard]
    for piece in shard.pieces:
        start, stop = (
            min(piece.stop, piece.start - -max(0, border - piece.start) // _WHOLE_VECTORS * _WHOLE_VECTORS)
            for border in (begin, end)
        )
        if start < stop:
            key = state.groups[piece.tensor], state.began[piece.tensor]
            call = calls.setdefault(key, _Call(*key))
            call.weights.append(master[start:stop])
            call.gradients.append(shard.gradient[start:stop])
            call.first.append(first[start:stop])
            call.second.append(second[start:stop])
    return list(calls.values())
