"""Do copies of the same weights still agree? Memory forgets: a flipped bit of one replica trains on in silence.

Every rank sums the bits of its weight buffers as integers, just before an update, and all ranks compare the sums on the
host: of a part of the model over its data-parallel owners, and of tensors that every tensor rank holds whole over the
tensor axis. Where fp32 masters exist beside the weights, their rounding is compared with the weights as well. Only
where sums differ the tensors are looked at one by one. The copies of most ranks are taken to be right; of two, either.
Parts whose weights are sharded have no copies to compare.

Cost: one pass over the weights and one exchange of a few integers (docs/results/reliability.md).
"""

import socket
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.build import Part, Towers
from engine.optim.optimizer import ShardedOptimizer
from engine.parallel.agree import everyone
from engine.parallel.mesh import Mesh

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
_SHOWN = 4


@dataclass(frozen=True)
class _Copy:
    """A sum of bits and which other ranks must have the same."""

    what: str
    same_on: Hashable
    """Ranks with an equal value hold the same bits."""
    bits: int


class Audit:
    """Compares copies of weights. Collective over the mesh."""

    def __init__(self, towers: Towers, optimizer: ShardedOptimizer, mesh: Mesh, *, every_steps: tuple[int, ...]):
        """every_steps: due in each of these rhythms; 0 is none."""
        self.towers, self.optimizer, self.mesh = towers, optimizer, mesh
        self._parts = [
            (number, part)
            for number, part in enumerate(towers.parts)
            if part.sharded is None or part.sharded.axes is None
        ]
        self._every_steps = [steps for steps in every_steps if steps]

    def due(self, step: int) -> bool:
        """Whether the copies are compared before the update of this step (0-based)."""
        return any((step + 1) % steps == 0 for steps in self._every_steps)

    @torch.no_grad()
    def __call__(self) -> str:
        """What differs, in words, the same on every rank; empty if nothing does. Between backward and update."""
        self._wait_for_gathers_under_way()
        if not self._compare(self._whole_parts):
            return ""
        return self._compare(self._tensors) or self._compare(self._whole_parts)

    def _wait_for_gathers_under_way(self) -> None:
        """Wait without starting new ones (as waiting for weights would), which would mend what is looked for."""
        for _, part in self._parts:
            for group in part.ddp.bucket_groups:
                if group.param_gather_handle is not None:
                    group.finish_param_sync(skip_next_bucket_dispatch=True)

    def _compare(self, copies_of: Callable[[], list[_Copy]]) -> str:
        ranks = everyone((socket.gethostname(), copies_of()), self.mesh.control)
        groups: dict[Hashable, list[tuple[int, str, _Copy]]] = {}
        for rank, (host, copies) in enumerate(ranks):
            for copy in copies:
                groups.setdefault((copy.what, copy.same_on), []).append((rank, host, copy))
        lines = [line for members in groups.values() if (line := _odd_ones(members))]
        more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        return "; ".join(lines[:_SHOWN]) + more

    def _whole_parts(self) -> list[_Copy]:
        copies = [
            _Copy(self._name(number), self._owners_of(number), sum(_bits(b.param_data) for b in part.ddp.buffers))
            for number, part in self._parts
        ]
        whole = [
            _bits(parameter)
            for _, part in self._parts
            for local, parameter in part.ddp.module.named_parameters()
            if self._has_tensor_copies(part, local)
        ]
        copies.append(_Copy("tensors that are not cut", self._tensor_copies(), sum(whole)))
        return [*copies, *self._masters()]

    def _tensors(self) -> list[_Copy]:
        copies = []
        for number, part in self._parts:
            for local, parameter in part.ddp.module.named_parameters():
                tensor = part.logical[local]
                bits = _bits(parameter)
                copies.append(_Copy(tensor.name, self._owners_of(number), bits))
                if self._has_tensor_copies(part, local):
                    copies.append(_Copy(tensor.name, self._tensor_copies(), bits))
        return [*copies, *self._masters()]

    def _has_tensor_copies(self, part: Part, local: str) -> bool:
        """Whether every tensor rank holds this tensor of the vision tower whole."""
        return (
            self.mesh.tensor.size > 1 and part.owners is not self.mesh.world and part.logical[local].split_dim is None
        )

    def _masters(self) -> list[_Copy]:
        """Weights beside the rounding of their fp32 masters: two "copies" of one rank."""
        copies = []
        for tower in self.optimizer.towers:
            for shard, master in zip(tower.shards.shards, tower.master, strict=True):
                if master is not shard.weight:
                    for bits in (_bits(shard.weight), _bits(master.to(shard.weight.dtype))):
                        copies.append(_Copy("fp32 masters", ("own", self.mesh.world.rank, id(shard)), bits))
        return copies

    def _name(self, number: int) -> str:
        part = self.towers.parts[number]
        return "text tower" if part.owners is self.mesh.world else f"stage {self.mesh.pipeline.rank}, chunk {number}"

    def _owners_of(self, number: int) -> Hashable:
        if self.towers.parts[number].owners is self.mesh.world:
            return "all"
        return "owners", number, self.mesh.pipeline.rank, self.mesh.tensor.rank

    def _tensor_copies(self) -> Hashable:
        return "tensor", self.mesh.pipeline.rank, self.mesh.data.rank


def _bits(values: Tensor) -> int:
    """Sum of the bits as integers, modulo 2^64: a flipped bit changes it by a power of two. Eight bytes at a time where
    they lie so: sums of narrower integers take ten times as long.
    """
    flat = values.detach().reshape(-1)
    size = flat.element_size()
    if flat.numel() * size % 8 == 0 and flat.storage_offset() * size % 8 == 0:
        return int(flat.view(torch.int64).sum())
    return int(flat.view(_WORDS[size]).sum(dtype=torch.int64))


def _odd_ones(members: list[tuple[int, str, _Copy]]) -> str:
    """Which of the ranks differ from most of the others."""
    usual, count = Counter(copy.bits for _, _, copy in members).most_common(1)[0]
    if count == len(members):
        return ""
    what = members[0][2].what
    odd = [f"rank {rank} on {host}" for rank, host, copy in members if copy.bits != usual]
    if 2 * count > len(members):
        return f"{what} of {', '.join(odd)} differs from {count} other copies"
    ranks = list(dict.fromkeys(f"rank {rank} on {host}" for rank, host, _ in members))
    return f"{what} differs between {' and '.join(ranks)}" if len(ranks) > 1 else f"{what} of {ranks[0]} do not fit"
