"""Do copies of the same weights still agree, and is what has no copy still what it was? Memory forgets: a flipped bit
of one replica trains on in silence.

Every rank sums the bits of its weight buffers as integers, just before an update, and all ranks compare the sums on the
host: of a part of the model over its data-parallel owners, and of tensors that every tensor rank holds whole over the
tensor axis. Where fp32 masters exist beside the weights, their rounding is compared with the weights as well. Only
where sums differ the tensors are looked at one by one. The copies of most ranks are taken to be right; of two, either.
Parts whose weights are sharded have no copies to compare but those from which groups of neighbours gather them
(parallel.shard_ranks).

What one rank alone owns (fp32 masters, moments, the average) is written by updates only. Sums of its bits are kept from
the end of an update to the next one; that a rank found a difference, all hear before that update counts: with the
gradient norm, or, where the update itself looks, before anything of it is averaged, recorded or saved.

Cost: one pass over the weights and one exchange of a few integers each time, two passes over the owned state a step
(docs/results/reliability.md).
"""

import socket
from collections import Counter
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import sum_of_bits
from engine.build import Part, Towers
from engine.optim.blocks import BlockSums
from engine.optim.optimizer import ShardedOptimizer
from engine.optim.state import Sums
from engine.parallel.agree import everyone
from engine.parallel.mesh import Mesh

_SHOWN = 4
_FOUND = 2


@dataclass(frozen=True)
class _Copy:
    """A sum of bits and which other ranks must have the same."""

    what: str
    same_on: Hashable
    """Ranks with an equal value hold the same bits."""
    bits: int


class AtRest:
    """The owned state between two updates, when nobody may write it. Local; waits for no device.

    Kinds that the optimizer's rule sums on its way through them are looked at by the update itself, the others before
    it. Those that the last update has summed while it wrote are not read again after it.
    """

    def __init__(self, optimizer: ShardedOptimizer, *, watched: bool):
        """watched: otherwise nothing is looked at."""
        self._optimizer, self._watched = optimizer, watched
        self._left: list[BlockSums] | None = None
        """Sums of what the last update has left, one a tower."""
        self._tables: dict[tuple[int, int], BlockSums] = {}
        """Where sums go, by tower and number: two by turns for what updates leave, one for what is found."""
        self._turn = 0
        """Number of the last update's table."""
        self._changed: dict[int, tuple[list[str], Tensor]] = {}
        """Kinds of state by tower (frozen ones: -1, -2, …), and which have changed by themselves, bool [kinds]."""
        self._frozen: list[BlockSums] | None = None
        """The same of weights that are not trained, which only loading writes."""

    def begin(self) -> None:
        """An update has written the state, which stays as it is until the next one."""
        if not self._watched:
            return
        self._left, self._turn = [], 1 - self._turn
        for number, tower in enumerate(self._optimizer.towers):
            left = self._table(number, self._turn) if tower.sums.left is None else tower.sums.left
            self._left.append(left.take_the_rest())
            tower.sums = Sums()
        if self._frozen is None:
            self._frozen = self._sum_frozen()

    def _table(self, tower: int, number: int) -> BlockSums:
        table = self._optimizer.towers[tower].to_sum(self._tables.get((tower, number)))
        self._tables[tower, number] = table
        return table

    def _sum_frozen(self) -> list[BlockSums]:
        return [tower.to_sum().take_the_rest() for tower in self._optimizer.frozen]

    def check_frozen(self) -> None:
        """Look at weights that are not trained, as often as copies are compared."""
        if self._frozen is not None:
            for number, (left, found) in enumerate(zip(self._frozen, self._sum_frozen(), strict=True)):
                self._note(-1 - number, ["frozen weight"] * len(found.kinds), found.differences(left, found.taken))

    def check(self, *, update_follows: bool = False) -> None:
        """Look whether it is still so, just before the next update.

        update_follows: at once, and `check_the_rest` in it: kinds that the rule sums on its way are left to that.
        """
        for number, tower in enumerate(self._optimizer.towers):
            later = self._optimizer.rule.sums_on_its_way(tower) if update_follows else ()
            found = None
            if self._left is not None:
                found = self._table(number, _FOUND).take_the_rest(but=later)
                if early := tower.kinds().keys() - later:
                    self._compare(number, found, early)
            left = self._table(number, 1 - self._turn) if self._watched and update_follows else None
            tower.sums = Sums(found if later else None, left)

    def check_the_rest(self) -> int:
        """Look at the kinds that were left to the update, which has summed them; how many have changed on all ranks.
        Collective over all ranks.
        """
        towers = self._optimizer.towers
        if not (self._watched and self._optimizer.rule.sums_on_a_cpu and towers[0].shards.counted.is_cpu):
            return 0
        for number, tower in enumerate(towers):
            if tower.sums.found is not None:
                self._compare(number, tower.sums.found, self._optimizer.rule.sums_on_its_way(tower))
        return self._optimizer.over_all_ranks(self.count())

    def check_now(self) -> int:
        """The same where no update comes that would look: a step is not sound, and its state may be why."""
        if not self._watched:
            return 0
        self.check()
        return self._optimizer.over_all_ranks(self.count())

    def _compare(self, number: int, found: BlockSums, kinds: Collection[str]) -> None:
        if self._left is not None:
            self._note(number, found.kinds, found.differences(self._left[number], kinds))

    def _note(self, number: int, kinds: list[str], changed: Tensor) -> None:
        _, seen = self._changed.get(number, (kinds, None))
        self._changed[number] = kinds, changed if seen is None else seen | changed

    def count(self) -> Tensor:
        """How many kinds of state have changed by themselves since `end`: 0-d, float64, on the device."""
        if not self._changed:
            return torch.zeros((), dtype=torch.float64, device=self._optimizer.towers[0].shards.counted.device)
        return torch.cat([changed for _, changed in self._changed.values()]).sum(dtype=torch.float64)

    def end(self) -> None:
        """Something else than an update writes the state: what was seen of it is of no use any more."""
        self._left, self._frozen, self._changed = None, None, {}

    def changed(self) -> list[str]:
        """Kinds of state that have changed by themselves since `end`; waits for the device."""
        seen = [zip(kinds, changed.tolist(), strict=True) for kinds, changed in self._changed.values()]
        return list(dict.fromkeys(kind for of_tower in seen for kind, differs in of_tower if differs))


class Audit:
    """Compares copies of weights, and what one rank owns with what it was. Collective over the mesh."""

    def __init__(
        self,
        towers: Towers,
        optimizer: ShardedOptimizer,
        mesh: Mesh,
        *,
        every_steps: tuple[int, ...],
        at_rest: AtRest,
    ):
        """every_steps: due in each of these rhythms; 0 is none."""
        self.towers, self.optimizer, self.mesh = towers, optimizer, mesh
        self.at_rest = at_rest
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
        """What is wrong, in words, the same on every rank; empty if nothing is. Outside of updates."""
        self.at_rest.check()
        self.at_rest.check_frozen()
        return self.compare()

    @torch.no_grad()
    def compare(self) -> str:
        """The same where what is at rest has just been checked."""
        self._wait_for_gathers_under_way()
        if not self._compare(self._whole_parts):
            return ""
        return self._compare(self._tensors) or self._compare(self._whole_parts)

    @torch.no_grad()
    def state(self) -> str:
        """What of the state at rest was seen to have changed; an update under way may have moved some copies."""
        return self._compare(list)

    def _wait_for_gathers_under_way(self) -> None:
        """Wait without starting new ones (as waiting for weights would), which would mend what is looked for."""
        for _, part in self._parts:
            for group in part.ddp.bucket_groups:
                if group.param_gather_handle is not None:
                    group.finish_param_sync(skip_next_bucket_dispatch=True)

    def _compare(self, copies_of: Callable[[], list[_Copy]]) -> str:
        ranks = everyone((socket.gethostname(), self.at_rest.changed(), copies_of()), self.mesh.control)
        changed = [f"{kind} of rank {rank} on {host}" for rank, (host, kinds, _) in enumerate(ranks) for kind in kinds]
        groups: dict[Hashable, list[tuple[int, str, _Copy]]] = {}
        for rank, (host, _, copies) in enumerate(ranks):
            for copy in copies:
                groups.setdefault((copy.what, copy.same_on), []).append((rank, host, copy))
        differs = [line for members in groups.values() if (line := _odd_ones(members))]
        found = {"state has changed between two updates": changed, "copies of weights are not equal": differs}
        return "; ".join(f"{what}: {_shown(lines)}" for what, lines in found.items() if lines)

    def _whole_parts(self) -> list[_Copy]:
        copies = [
            _Copy(
                self._name(number),
                self._owners_of(number),
                sum(sum_of_bits(b.param_data) for b in (*part.ddp.buffers, *part.frozen)),
            )
            for number, part in self._parts
        ]
        whole = [
            sum_of_bits(parameter)
            for _, part in self._parts
            for local, parameter in part.ddp.module.named_parameters()
            if self._has_tensor_copies(part, local)
        ]
        copies.append(_Copy("tensors that are not cut", self._tensor_copies(), sum(whole)))
        return [*copies, *self._slices_of_others(), *self._masters()]

    def _tensors(self) -> list[_Copy]:
        copies = []
        for number, part in self._parts:
            for local, parameter in part.ddp.module.named_parameters():
                tensor = part.logical[local]
                bits = sum_of_bits(parameter)
                copies.append(_Copy(tensor.name, self._owners_of(number), bits))
                if self._has_tensor_copies(part, local):
                    copies.append(_Copy(tensor.name, self._tensor_copies(), bits))
        return [*copies, *self._slices_of_others(), *self._masters()]

    def _slices_of_others(self) -> list[_Copy]:
        """What each group of gathering ranks has of the other groups' slices of sharded weights."""
        copies = []
        for number, part in enumerate(self.towers.parts):
            axes = part.sharded.axes if part.sharded is not None else None
            if part.sharded is not None and axes is not None and axes.outer is not None:
                same_on = ("gathered from", number, *dist.get_process_group_ranks(axes.outer.group))
                bits = sum(sum_of_bits(slices) for slices in part.sharded.copies)
                copies.append(_Copy(f"gathered slices of {self._name(number)}", same_on, bits))
        return copies

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
                    for bits in (sum_of_bits(shard.weight), sum_of_bits(master.to(shard.weight.dtype))):
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


def _shown(lines: list[str]) -> str:
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return "; ".join(lines[:_SHOWN]) + more


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
