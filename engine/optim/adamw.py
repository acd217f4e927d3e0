"""AdamW (Loshchilov, Hutter 2019) over sharded state by torch's fused kernel: one pass over everything."""

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from engine.config.read import OptimConfig
from engine.optim.state import OwnedState, Rule


class AdamW(Rule):
    """p -= rate x (m / c1 / (sqrt(v / c2) + eps) + decay x p); elementwise, so every layout does the same."""

    def update(
        self, state: OwnedState, optim: OptimConfig, *, gradient_scale: float, rates: Mapping[str, float], t: int
    ) -> Iterator[None]:
        """The whole update of the owned elements; pieces of one rate, one decay and one age go into one call."""
        yield
        equal: dict[tuple[float, float, float], list[tuple[Tensor, ...]]] = defaultdict(list)
        for i, piece in state.shards.owned():
            group, part = state.groups[piece.tensor], slice(piece.start, piece.stop)
            moments = (flats[i] for flats in state.moments.values())
            flats = (state.master[i], state.shards.shards[i].gradient, *moments)
            key = rates[group.tower] * group.lr_scale, group.weight_decay, t - 1.0 - state.began[piece.tensor]
            equal[key].append(tuple(flat[part] for flat in flats))
        device = state.shards.counted.device
        # Without a scale the kernel does not write the gradients back.
        scale = None if gradient_scale == 1 else torch.full((), 1 / gradient_scale, device=device)
        for (rate, decay, updates), pieces in equal.items():
            weights, gradients, first, second = map(list, zip(*pieces, strict=True))
            torch_adamw(
                weights,
                gradients,
                first,
                second,
                [],
                list(torch.full((len(pieces),), updates, device=device).unbind()),
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
        torch._foreach_copy_([shard.weight for shard in state.shards.shards], state.master)
